//! Killed at any moment, on a full disk, over a reboot.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::stage::{Node, is_root, pod_namespace};

/// How many kills; `KEELSON_KILL_ROUNDS` asks for more.
fn rounds() -> u32 {
    std::env::var("KEELSON_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(40)
}

#[test]
fn killed_in_add_or_del_the_next_call_makes_it_whole() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let ports =
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let config = node.with(json!({ "runtimeConfig": ports }));
    for round in 0..rounds() {
        let namespace = pod_namespace();
        let after = Duration::from_micros(RandomState::new().hash_one(round) % 6000);
        let verb = if round % 2 == 0 { "ADD" } else { "DEL" };
        if verb == "DEL" {
            node.call("ADD", "c", Some(&namespace), &config).unwrap();
        }
        let mut child = node.spawn(verb, "c", Some(&namespace), &config);
        // The moment is the point of this test.
        std::thread::sleep(after);
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        // As a runtime goes on that does not know what has happened.
        node.call("DEL", "c", Some(&namespace), &config).unwrap();
        let again = node.call("ADD", "c", Some(&namespace), &config);
        assert!(again.is_ok(), "round {round}: {again:?}");
        node.call("CHECK", "c", Some(&namespace), &config).unwrap();
        node.call("DEL", "c", Some(&namespace), &config).unwrap();
        node.is_clean();
    }
}

#[test]
fn a_killed_add_is_begun_anew_without_a_del() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    for round in 0..rounds() / 4 {
        let namespace = pod_namespace();
        let after = Duration::from_micros(RandomState::new().hash_one(round) % 6000);
        let mut child = node.spawn("ADD", "c", Some(&namespace), &node.config);
        std::thread::sleep(after);
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        match node.add("c", &namespace) {
            Ok(_) => {}
            // It had finished.
            Err(error) => assert!(error.to_string().contains("already"), "{error}"),
        }
        node.call("CHECK", "c", Some(&namespace), &node.config).unwrap();
        node.del("c", Some(&namespace)).unwrap();
    }
}

#[test]
fn a_full_disk_takes_no_address_and_loses_none() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let folder = node.data.path().join("test");
    fs::create_dir(&folder).unwrap();
    mount(Some("small"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=16k")).unwrap();
    let pod = node.pod("c");
    let mut size = 8192;
    while size > 0 {
        let chunk = fs::OpenOptions::new().append(true).create(true).open(folder.join("fill"));
        if std::io::Write::write_all(&mut chunk.unwrap(), &vec![1; size]).is_err() {
            size /= 2;
        }
    }
    // What still fits into the journal's last page may succeed.
    let mut refused = None;
    let mut more = Vec::new();
    for number in 0..40 {
        let namespace = pod_namespace();
        let id = format!("x{number}");
        match node.add(&id, &namespace) {
            Ok(_) => more.push((id, namespace)),
            Err(error) => {
                refused = Some(error.to_string());
                break;
            }
        }
    }
    let error = refused.expect("the disk is full");
    assert!(error.contains("journal") && error.contains("No space left"), "{error}");
    node.call("CHECK", "c", Some(&pod.namespace), &node.config).unwrap();
    fs::remove_file(folder.join("fill")).unwrap();
    for (id, namespace) in &more {
        node.del(id, Some(namespace)).unwrap();
    }
    node.del("c", Some(&pod.namespace)).unwrap();
    node.is_clean();
    umount2(&folder, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_reboot_frees_every_address() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/30"]);
    drop([node.pod("one"), node.pod("two")]);
    while !node.links().is_empty() {
        std::thread::yield_now();
    }
    let journal = node.data.path().join("test/journal");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = fs::read_to_string(&journal).unwrap();
    // As another boot has written it; each line starts with a checksum of the rest.
    let before: String = text
        .lines()
        .map(|line| line[17..].replace(boot.trim(), "00000000-0000-0000-0000-000000000000"))
        .map(|json| format!("{:016x} {json}\n", keelson_cni::names::fnv1a(json.as_bytes())))
        .collect();
    fs::write(&journal, before).unwrap();
    let pods = [node.pod("three"), node.pod("four")];
    assert_ne!(pods[0].ips, pods[1].ips);
}

#[test]
fn who_waits_too_long_for_the_lock_is_told() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    drop(node.pod("c"));
    let file = fs::File::open(node.data.path().join("test/lock")).unwrap();
    let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let namespace = pod_namespace();
    let config = node.with(json!({ "lockTimeoutSecs": 1 }));
    let error = node.call("ADD", "d", Some(&namespace), &config).unwrap_err();
    assert!(error["code"] == 11 && error.to_string().contains("lock"), "{error}");
    drop(lock);
    node.add("d", &namespace).unwrap();
}
