//! The real kubectl against the node's HTTPS API, through a stand-in for the API server that passes
//! requests on as a real one does.
//!
//! Which kubectl: `KEELSON_TEST_KUBECTL` names programs, separated by colons; `kubectl` otherwise. A
//! kubectl that speaks WebSocket is made to speak SPDY as well.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "a failure in a test may panic, and its modules are its own"
)]

#[path = "server/fixture.rs"]
mod fixture;
#[path = "server/proxy.rs"]
mod proxy;

use std::net::SocketAddr;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use fixture::Node;

const DEADLINE: Duration = Duration::from_secs(30);

struct Kubectl {
    program: String,
    websockets: bool,
    server: SocketAddr,
}

impl Kubectl {
    fn spawn(&self, args: &[&str]) -> Child {
        let websockets = self.websockets.to_string();
        Command::new(&self.program)
            .arg(format!("--server=http://{}", self.server))
            .args(args)
            .env("KUBECONFIG", "/dev/null")
            .env("HOME", "/nonexistent")
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", &websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", &websockets)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("needs {}: {error}", self.program))
    }

    async fn run(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.spawn(args);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writing = tokio::spawn(async move {
            drop(stdin.write_all(&input).await);
        });
        let output = tokio::time::timeout(DEADLINE, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("{} {args:?} hangs", self.program))
            .unwrap();
        writing.await.unwrap();
        output
    }

    async fn expect(&self, args: &[&str], input: &[u8], code: i32, out: &[u8], err: &str) {
        let got = self.run(args, input).await;
        let stderr = String::from_utf8_lossy(&got.stderr).into_owned();
        let what = format!("{} (websockets: {}) {args:?}: {stderr}", self.program, self.websockets);
        assert_eq!(got.status.code(), Some(code), "{what}");
        assert!(got.stdout == out, "{what}: {} bytes out", got.stdout.len());
        assert!(stderr.contains(err), "{what}");
    }
}

async fn each_kubectl(test: impl AsyncFn(&Node, &Kubectl)) {
    let programs = std::env::var("KEELSON_TEST_KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
    for program in programs.split(':') {
        for websockets in [true, false] {
            let node = Node::start(|_| ()).await;
            let server = node.api_server(proxy::serve).await;
            test(&node, &Kubectl { program: program.to_owned(), websockets, server }).await;
        }
    }
}

#[tokio::test]
async fn exec_carries_streams_and_exit_codes() {
    each_kubectl(async |_, kubectl| {
        kubectl
            .expect(&["exec", "web", "-c", "main", "--", "echo", "a b"], b"", 0, b"a b\n", "")
            .await;
        let both =
            ["exec", "web", "-c", "main", "--", "sh", "-c", "echo out; echo err >&2; exit 3"];
        kubectl.expect(&both, b"", 3, b"out\n", "err\n").await;
        let cat = ["exec", "-i", "web", "-c", "main", "--", "cat"];
        kubectl.expect(&cat, b"some words\n", 0, b"some words\n", "").await;
        let missing = ["exec", "web", "-c", "main", "--", "/no/such/program"];
        kubectl.expect(&missing, b"", 1, b"", "cannot start /no/such/program").await;
        let waiting = ["exec", "web", "-c", "slow", "--", "true"];
        kubectl.expect(&waiting, b"", 1, b"", "container not found").await;
    })
    .await;
}

#[tokio::test]
async fn exec_loses_nothing_of_much_data() {
    each_kubectl(async |_, kubectl| {
        let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i % 251) as u8).collect();
        kubectl
            .expect(&["exec", "-i", "web", "-c", "main", "--", "cat"], &data, 0, &data, "")
            .await;
        let count = ["exec", "-i", "web", "-c", "main", "--", "wc", "-c"];
        kubectl.expect(&count, &data, 0, format!("{}\n", data.len()).as_bytes(), "").await;
    })
    .await;
}

#[tokio::test]
async fn a_child_that_keeps_the_output_open_does_not_hold_exec_up() {
    each_kubectl(async |_, kubectl| {
        let command = ["exec", "web", "-c", "main", "--", "sh", "-c", "sleep 20 & echo done"];
        kubectl.expect(&command, b"", 0, b"done\n", "").await;
    })
    .await;
}

#[tokio::test]
async fn attach_talks_to_the_first_process() {
    each_kubectl(async |_, kubectl| {
        let mut child = kubectl.spawn(&["attach", "-i", "web", "-c", "main"]);
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        stdin.write_all(b"hello\n").await.unwrap();
        let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap();
        assert_eq!(line.as_deref(), Some("hello"));
        drop(stdin);
        tokio::time::timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn logs_follow_until_the_container_ends() {
    each_kubectl(async |node, kubectl| {
        node.log("one");
        node.log("two");
        kubectl.expect(&["logs", "web", "-c", "main", "--tail=1"], b"", 0, b"two\n", "").await;
        let stamped = ["logs", "web", "-c", "main", "--tail=1", "--timestamps"];
        kubectl.expect(&stamped, b"", 0, b"2026-01-02T15:04:05.000000001Z two\n", "").await;
        let mut child = kubectl.spawn(&["logs", "-f", "web", "-c", "main"]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next =
            async || tokio::time::timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap();
        assert_eq!(next().await.as_deref(), Some("one"));
        assert_eq!(next().await.as_deref(), Some("two"));
        node.log("three");
        assert_eq!(next().await.as_deref(), Some("three"));
        node.running.send_replace(false);
        assert_eq!(next().await, None);
        assert!(child.wait().await.unwrap().success());
    })
    .await;
}

#[tokio::test]
async fn why_there_are_no_logs() {
    each_kubectl(async |_, kubectl| {
        let text = "container \"slow\" in pod \"web\" is waiting to start: ContainerCreating";
        kubectl.expect(&["logs", "web", "-c", "slow"], b"", 1, b"", text).await;
        let text = "previous terminated container \"main\" in pod \"web\" not found";
        kubectl.expect(&["logs", "-p", "web", "-c", "main"], b"", 1, b"", text).await;
    })
    .await;
}

#[tokio::test]
async fn port_forward_reaches_a_port_of_the_pod() {
    each_kubectl(async |_, kubectl| {
        let echo = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = echo.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut reading, mut writing) = socket.split();
                    drop(tokio::io::copy(&mut reading, &mut writing).await);
                });
            }
        });
        let mut child = kubectl.spawn(&["port-forward", "pod/web", &format!(":{port}")]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line =
            tokio::time::timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let local = line.split_once("127.0.0.1:").unwrap().1.split(' ').next().unwrap();
        let local: u16 = local.parse().unwrap();
        for round in 0..3_u32 {
            let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", local)).await.unwrap();
            let data = vec![round as u8; 300_000];
            let (mut reading, mut writing) = socket.split();
            let mut got = Vec::new();
            let sending = async {
                writing.write_all(&data).await.unwrap();
                writing.shutdown().await.unwrap();
            };
            let receiving = tokio::time::timeout(DEADLINE, reading.read_to_end(&mut got));
            let ((), received) = tokio::join!(sending, receiving);
            received.unwrap().unwrap();
            assert!(got == data, "round {round}: {} of {} bytes", got.len(), data.len());
        }
    })
    .await;
}
