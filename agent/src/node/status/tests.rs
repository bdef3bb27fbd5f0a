use std::net::Ipv4Addr;

use super::*;

fn seen() -> Observation {
    Observation {
        machine: Machine {
            cpus: 2,
            memory_bytes: 4 << 30,
            architecture: "amd64",
            ..Machine::default()
        },
        usage: Usage {
            memory_available: 3 << 30,
            disk_total: 100 << 30,
            disk_available: 50 << 30,
            inodes_total: 1000,
            inodes_free: 900,
            pids_max: 32_768,
            pids_used: 500,
            hugepages: BTreeMap::from([("2Mi".to_owned(), 64 << 20)]),
        },
        addresses: vec![IpAddr::from(Ipv4Addr::new(192, 0, 2, 7))],
        runtime_version: "containerd://1.6.20".to_owned(),
        ..Observation::default()
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn condition<'a>(status: &'a NodeStatus, type_: &str) -> &'a NodeCondition {
    status.conditions.iter().flatten().find(|c| c.type_ == type_).unwrap()
}

fn amount(map: &Option<BTreeMap<String, Quantity>>, name: &str) -> String {
    map.as_ref().unwrap()[name].0.clone()
}

#[test]
fn allocatable_is_capacity_less_reservations_and_thresholds() {
    let mut config = AgentConfig::default();
    config.node.kube_reserved = BTreeMap::from([("cpu".to_owned(), 250)]);
    config.node.system_reserved = BTreeMap::from([("memory".to_owned(), 1 << 30)]);
    let status = status(&config, &seen(), &NodeStatus::default(), at(100));
    assert_eq!(amount(&status.capacity, "cpu"), "2");
    assert_eq!(amount(&status.allocatable, "cpu"), "1750m");
    assert_eq!(amount(&status.capacity, "memory"), "4194304Ki");
    let left = (4_u64 << 20) - (64 << 10) - (1 << 20) - (100 << 10);
    assert_eq!(amount(&status.allocatable, "memory"), format!("{left}Ki"));
    assert_eq!(amount(&status.allocatable, "ephemeral-storage"), "90Gi");
    assert_eq!(amount(&status.allocatable, "pods"), "110");
    assert_eq!(amount(&status.allocatable, "hugepages-2Mi"), "64Mi");
}

#[test]
fn resources_of_others_survive_and_can_be_allocated() {
    let gpu = || BTreeMap::from([("example.com/gpu".to_owned(), Quantity("3".to_owned()))]);
    let previous = NodeStatus { capacity: Some(gpu()), ..NodeStatus::default() };
    let status = status(&AgentConfig::default(), &seen(), &previous, at(100));
    assert_eq!(amount(&status.capacity, "example.com/gpu"), "3");
    assert_eq!(amount(&status.allocatable, "example.com/gpu"), "3");
}

#[test]
fn hugepages_that_are_gone_disappear() {
    let config = AgentConfig::default();
    let before = status(&config, &seen(), &NodeStatus::default(), at(100));
    let mut now = seen();
    now.usage.hugepages.clear();
    let after = status(&config, &now, &before, at(110));
    assert!(!after.capacity.unwrap().contains_key("hugepages-2Mi"));
}

#[test]
fn a_condition_keeps_its_transition_time_until_it_changes() {
    let config = AgentConfig::default();
    let first = status(&config, &seen(), &NodeStatus::default(), at(100));
    let second = status(&config, &seen(), &first, at(110));
    assert!(!differs(&first, &second));
    assert_eq!(condition(&second, "Ready").last_transition_time, Some(Time(at(100))));
    assert_eq!(condition(&second, "Ready").last_heartbeat_time, Some(Time(at(110))));

    let mut down = seen();
    down.not_ready = vec!["container runtime is down".to_owned()];
    let third = status(&config, &down, &second, at(120));
    assert!(differs(&second, &third));
    let ready = condition(&third, "Ready");
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_deref()),
        ("False", Some("KubeletNotReady"))
    );
    assert_eq!(ready.message.as_deref(), Some("container runtime is down"));
    assert_eq!(ready.last_transition_time, Some(Time(at(120))));
}

#[test]
fn conditions_of_others_stay() {
    let foreign = NodeCondition { type_: "KernelDeadlock".to_owned(), ..NodeCondition::default() };
    let previous = NodeStatus { conditions: Some(vec![foreign.clone()]), ..NodeStatus::default() };
    let status = status(&AgentConfig::default(), &seen(), &previous, at(100));
    assert_eq!(status.conditions.as_ref().unwrap()[0], foreign);
    assert_eq!(status.conditions.unwrap().len(), 5);
}

#[test]
fn pressure_follows_the_thresholds() {
    let config = AgentConfig::default();
    let measure = |change: fn(&mut Usage)| {
        let mut seen = seen();
        change(&mut seen.usage);
        Pressure::measure(&config, &seen.machine, &seen.usage)
    };
    assert_eq!(measure(|_| ()), Pressure::default());
    assert!(measure(|u| u.memory_available = 99 << 20).memory);
    assert!(measure(|u| u.disk_available = 9 << 30).disk);
    assert!(measure(|u| u.inodes_free = 49).disk);
    assert!(!measure(|u| (u.inodes_total, u.inodes_free) = (0, 0)).disk);
    assert!(measure(|u| u.pids_used = u.pids_max - 5).pid);
}

#[test]
fn at_most_fifty_images_largest_first() {
    let mut seen = seen();
    seen.images =
        (0..60).map(|i| NodeImage { names: vec![format!("img-{i}")], size_bytes: i }).collect();
    let status = status(&AgentConfig::default(), &seen, &NodeStatus::default(), at(100));
    let images = status.images.unwrap();
    assert_eq!((images.len(), images[0].size_bytes), (50, Some(59)));
}

#[test]
fn sub_second_times_are_no_change() {
    let now = Timestamp::from_millisecond(100_900).unwrap();
    let status = status(&AgentConfig::default(), &seen(), &NodeStatus::default(), now);
    assert_eq!(condition(&status, "Ready").last_transition_time, Some(Time(at(100))));
}
