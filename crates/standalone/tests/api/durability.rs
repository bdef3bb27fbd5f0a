//! kill -9 at any moment: what was answered is there, what was seen stays true.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use keelson_standalone::{Registry, StandaloneConfig};
use serde_json::{Value, json};

use crate::client::Client;
use crate::plane::Process;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const ROUNDS: u32 = 12;

/// Name to the version and number of its last answered write.
type Answered = Arc<Mutex<BTreeMap<String, (u64, u64)>>>;

/// Writes until the server is gone.
async fn write(client: Client, writer: u32, start: u64, answered: Answered) {
    for number in start.. {
        let name = format!("w{writer}-{}", number % 5);
        let body = json!({"metadata": {"name": name}, "data": {"n": number.to_string()}});
        let headers = [("content-type", "application/json")];
        let path = format!("{MAPS}/{name}");
        let put = client.try_json("PUT", &path, &headers, Some(&body)).await;
        let outcome = match put {
            Ok((404, _)) => client.try_json("POST", MAPS, &headers, Some(&body)).await,
            other => other,
        };
        match outcome {
            Ok((200 | 201, value)) => {
                let version = version(&value);
                answered.lock().unwrap().insert(name, (version, number));
            }
            Ok((status, body)) => panic!("{status}: {body}"),
            Err(_) => return,
        }
    }
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answered_writes_survive_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let answered = Answered::default();
    // A fixed sequence: a failure can be had again.
    let mut random = 0x9E37_79B9_u32;
    for round in 0..ROUNDS {
        let mut server = Process::start(dir.path());
        let client = Client::from_kubeconfig(&server.kubeconfig);
        check(&client, &answered).await;
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let start = u64::from(round) * 1_000_000;
                tokio::spawn(write(client.clone(), writer, start, Arc::clone(&answered)))
            })
            .collect();
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The moment of the kill is what is tested.
        tokio::time::sleep(Duration::from_millis(u64::from(20 + random % 300))).await;
        server.kill();
        for writer in writers {
            writer.await.unwrap();
        }
    }
    let server = Process::start(dir.path());
    check(&Client::from_kubeconfig(&server.kubeconfig), &answered).await;
    assert!(!answered.lock().unwrap().is_empty());
}

/// Each object is as answered last, or newer: a write may have been stored without its answer.
async fn check(client: &Client, answered: &Answered) {
    let (_, list) = client.get(MAPS).await;
    let newest = version(&list);
    let stored: BTreeMap<&str, &Value> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (item["metadata"]["name"].as_str().unwrap(), item))
        .collect();
    for (name, (seen, number)) in answered.lock().unwrap().iter() {
        let object = stored.get(name.as_str()).unwrap_or_else(|| panic!("{name} is lost"));
        let has: u64 = object["data"]["n"].as_str().unwrap().parse().unwrap();
        assert!(has >= *number && version(object) >= *seen, "{name}: {has} is older than {number}");
        assert!(newest >= version(object));
    }
}

#[tokio::test]
async fn addresses_are_known_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let services = "/api/v1/namespaces/default/services";
    let service = |name: &str| json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30500}]}});
    let mut server = Process::start(dir.path());
    let client = Client::from_kubeconfig(&server.kubeconfig);
    assert_eq!(client.post(services, &service("a")).await.0, 201);
    server.kill();
    let server = Process::start(dir.path());
    let client = Client::from_kubeconfig(&server.kubeconfig);
    let (status, body) = client.post(services, &service("b")).await;
    assert_eq!(status, 422);
    assert!(body["message"].as_str().unwrap().contains("already allocated"), "{body}");
}

#[tokio::test]
async fn two_servers_do_not_share_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Process::start(dir.path());
    let error = Registry::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("is in use by another process"), "{error}");
}

async fn start_in(dir: &Path) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = StandaloneConfig::new(dir.to_owned(), vec![listener]);
    match keelson_standalone::start(config).await {
        Ok(_) => "started".to_owned(),
        Err(error) => format!("{error:#}"),
    }
}

#[tokio::test]
async fn damage_is_told_with_the_file_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("store.redb"), vec![7_u8; 100_000]).unwrap();
    let text = start_in(dir.path()).await;
    assert!(text.contains("store.redb is not a keelson store or is damaged"), "{text}");
    assert!(text.contains("restore it from a backup"), "{text}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("pki")).unwrap();
    std::fs::write(dir.path().join("pki/ca.crt"), "x").unwrap();
    let text = start_in(dir.path()).await;
    assert!(text.contains("ca.key is missing beside"), "{text}");
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_reads_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start_on_small_disk(dir.path(), 4096);
    let client = Client::from_kubeconfig(&server.kubeconfig);
    let big = |n: u32| json!({"metadata": {"name": format!("big{n}")}, "data": {"a": "x".repeat(200_000)}});
    let mut stored = 0;
    let refusal = loop {
        let (status, body) = client.post(MAPS, &big(stored)).await;
        if status != 201 {
            break (status, body);
        }
        stored += 1;
        assert!(stored < 100, "the disk never became full");
    };
    assert_eq!(refusal.0, 507, "{}", refusal.1);
    let text = refusal.1["message"].as_str().unwrap();
    assert!(text.contains("store.redb") && text.contains("free space"), "{text}");
    let count = |list: &Value| list["items"].as_array().unwrap().len();
    let (status, list) = client.get(MAPS).await;
    assert_eq!((status, count(&list)), (200, stored as usize));
    server.give_space();
    assert_eq!(client.post(MAPS, &big(stored)).await.0, 201, "with space, writes go on");
    stored += 1;
    server.kill();
    let server = Process::start(dir.path());
    let client = Client::from_kubeconfig(&server.kubeconfig);
    assert_eq!(count(&client.get(MAPS).await.1), stored as usize, "all that was answered is there");
}
