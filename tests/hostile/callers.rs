//! Callers of the node's API servers that send nonsense, bombs, or nothing.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keelson_tests::netns;
use keelson_tests::node::{Node, read};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

/// Silent connections to each of the two servers.
const SILENT: usize = 4000;
/// The address of the node on its cable, where the kubelet's API listens.
const KUBELET: &str = "198.18.0.2:10250";

/// The silent connections need descriptors.
pub(crate) fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// A pod's token is enough to be heard by the endpoints that answer questions.
pub(crate) fn wrong_bodies(node: &Node) {
    let token = "cat /var/run/secrets/kubernetes.io/serviceaccount/token";
    let token = node.kubectl(&["exec", "client", "--", "sh", "-c", token]).unwrap();
    let base = format!("https://127.0.0.1:{}", node.api_port());
    let paths = [
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        "/apis/authorization.k8s.io/v1/subjectaccessreviews",
        "/apis/authorization.k8s.io/v1/namespaces/default/localsubjectaccessreviews",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        "/apis/authentication.k8s.io/v1/tokenreviews",
        "/api/v1/namespaces/default/serviceaccounts/default/token",
        "/api/v1/namespaces/default/pods",
    ];
    let deep = "[".repeat(100_000);
    let bodies =
        ["[]", "1", "\"x\"", "null", "{\"spec\":[]}", "{\"spec\":{\"audiences\":7}}", "", &deep];
    for path in paths {
        for body in bodies {
            let mut curl = Command::new("curl");
            curl.args(["-sk", "-m", "30", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST"]);
            curl.args(["-H", "Content-Type: application/json", "--data-binary", body]);
            curl.arg("-H").arg(format!("Authorization: Bearer {token}"));
            curl.arg(format!("{base}{path}"));
            let status = read(&mut curl).unwrap_or_else(|e| panic!("POST {path}: {e:#}"));
            let refused = status.starts_with('4') || status == "201";
            assert!(
                refused,
                "POST {path} of {:?} answered {status}",
                body.get(..40).unwrap_or(body)
            );
        }
    }
}

/// Small patches that would become very large objects.
pub(crate) fn patch_bombs(node: &Node) {
    node.kubectl(&["create", "configmap", "bomb", "--from-literal=a=b"]).unwrap();
    node.kubectl(&["annotate", "configmap", "bomb", "a=b"]).unwrap();
    let copy = |to: String| json!({"op": "copy", "from": "/metadata/annotations", "path": to});
    let doubling: Vec<_> = (0..40).map(|n| copy(format!("/metadata/annotations/k{n}"))).collect();
    let nesting: Vec<_> = (0..8000).map(|_| copy("/metadata/annotations/x".to_owned())).collect();
    for bomb in [doubling, nesting] {
        let file = node.scratch().join("bomb.json");
        std::fs::write(&file, serde_json::Value::from(bomb).to_string()).unwrap();
        let mut curl = Command::new("curl");
        curl.args(["-sk", "-m", "60", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PATCH"]);
        curl.args(["-H", "Content-Type: application/json-patch+json", "--data-binary"]);
        curl.arg(format!("@{}", file.display()));
        curl.args(client_certificate(node));
        let path = "api/v1/namespaces/default/configmaps/bomb";
        curl.arg(format!("https://127.0.0.1:{}/{path}", node.api_port()));
        let status = read(&mut curl).unwrap();
        assert!(status.starts_with('4'), "a bomb was answered with {status}");
    }
    node.kubectl(&["delete", "configmap", "bomb"]).unwrap();
}

/// The administrator's certificate and key, as curl takes them.
fn client_certificate(node: &Node) -> [String; 4] {
    let get = |field: &str, file: &str| {
        let path = format!("jsonpath={{.users[0].user.{field}}}");
        let encoded = node.kubectl(&["config", "view", "--raw", "-o", &path]).unwrap();
        let script = format!("base64 -d > {file}");
        let target = node.scratch().join(file);
        let mut decode = Command::new("sh");
        decode.args(["-c", &script]).current_dir(node.scratch()).stdin(Stdio::piped());
        let mut child = decode.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), encoded.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        target.display().to_string()
    };
    let certificate = get("client-certificate-data", "admin.crt");
    ["--cert".into(), certificate, "--key".into(), get("client-key-data", "admin.key")]
}

/// Connections that are opened and then say nothing.
pub(crate) struct SilentConnections {
    api: Vec<TcpStream>,
    kubelet: Vec<TcpStream>,
}

impl SilentConnections {
    pub(crate) fn open(node: &Node) -> SilentConnections {
        let api: SocketAddr = format!("127.0.0.1:{}", node.api_port()).parse().unwrap();
        let api = connect(&api);
        let kubelet = KUBELET.parse().unwrap();
        let kubelet =
            netns::spawn_in(&format!("{}-outside", node.name()), move || Ok(connect(&kubelet)));
        SilentConnections { api, kubelet: kubelet.join().unwrap().unwrap() }
    }

    /// Honest callers get their answers, and most of the silent connections are closed by the servers.
    pub(crate) fn leave_the_node_usable(mut self, node: &Node) {
        assert_eq!(node.kubectl(&["exec", "client", "--", "echo", "works"]).unwrap(), "works\n");
        node.kubectl(&["logs", "client"]).unwrap();
        for (name, connections) in [("API", &mut self.api), ("kubelet", &mut self.kubelet)] {
            let open = connections.iter_mut().filter_map(is_open).filter(|open| *open).count();
            println!("{name}: {open} of {} silent connections are still open", connections.len());
            assert!(open < SILENT / 2, "{name}: {open} silent connections are open");
        }
    }
}

fn connect(address: &SocketAddr) -> Vec<TcpStream> {
    let limit = Duration::from_secs(10);
    (0..SILENT).filter_map(|_| TcpStream::connect_timeout(address, limit).ok()).collect()
}

fn is_open(stream: &mut TcpStream) -> Option<bool> {
    stream.set_nonblocking(true).ok()?;
    Some(
        matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
    )
}

/// Exec and attach sessions that flood a process which does not read, and whose clients are then killed.
pub(crate) fn vanishing_streams(node: &Node) {
    let mut clients: Vec<Child> = Vec::new();
    for _ in 0..8 {
        let mut kubectl = node.kubectl_command(&["exec", "-i", "client", "--", "sleep", "100"]);
        kubectl.stdin(std::fs::File::open("/dev/zero").unwrap());
        clients.push(kubectl.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let mut follow = node.kubectl_command(&["logs", "-f", "client"]);
        clients.push(follow.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    }
    // Long enough to fill every queue between kubectl and the process.
    std::thread::sleep(Duration::from_secs(2));
    for client in &mut clients {
        client.kill().unwrap();
        client.wait().unwrap();
    }
}
