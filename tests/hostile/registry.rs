//! A registry that answers slowly, without end, or with lies.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use keelson_tests::image::{ImageSpec, write_busybox_archive};
use keelson_tests::node::{Node, until};
use keelson_tests::registry::Registry;

/// An answer that is read beyond this is not bounded: the largest honest document is a manifest.
const MUCH: u64 = 256 << 20;
/// As many as a node pulls at once, and more.
const SLOW_PULLS: usize = 12;

/// The hostile registry. It ends with the value.
pub(crate) struct Hostile {
    port: u16,
    ended: Arc<AtomicBool>,
    /// Bytes that the node took of endless answers.
    taken: Arc<AtomicU64>,
}

impl Hostile {
    pub(crate) fn start() -> Hostile {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (ended, taken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let hostile = Hostile { port, ended: ended.clone(), taken: taken.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (ended, taken) = (ended.clone(), taken.clone());
                std::thread::spawn(move || answer(&stream, port, &ended, &taken));
            }
        });
        hostile
    }

    /// The same server is two registries to the node, by its two names: the slow images wait for each other.
    fn image(&self, host: &str, name: &str) -> String {
        format!("{host}:{}/{name}:1", self.port)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // The accepting thread looks at the flag when somebody comes.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

/// Answers requests until the node gives up. Errors are the node's good right: it may hang up.
fn answer(stream: &TcpStream, port: u16, ended: &AtomicBool, taken: &AtomicU64) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if !matches!(reader.read_line(&mut request), Ok(1..)) {
            return;
        }
        let mut header = String::from("x");
        while !matches!(header.as_str(), "\r\n" | "") {
            header.clear();
            if reader.read_line(&mut header).is_err() {
                return;
            }
        }
        let path = request.split(' ').nth(1).unwrap_or("/");
        let mut out = stream;
        let sent = match path {
            "/v2/" => out.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
            path if path.starts_with("/v2/slow") => drip(out, ended),
            path if path.starts_with("/v2/token/") => challenge(out, port),
            path if path.starts_with("/v2/error/") => {
                flood(out, "500 Internal Server Error", ended, taken)
            }
            _ => flood(out, "200 OK", ended, taken),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// One byte from time to time: each of them keeps a plain read limit from ending the pull.
fn drip(mut out: &TcpStream, ended: &AtomicBool) -> std::io::Result<()> {
    out.write_all(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n\
          Content-Length: 1000000\r\n\r\n",
    )?;
    while !ended.load(Ordering::Relaxed) {
        out.write_all(b" ")?;
        std::thread::sleep(Duration::from_secs(1));
    }
    Err(std::io::ErrorKind::TimedOut.into())
}

/// A token is to be had at an address whose answer never ends.
fn challenge(mut out: &TcpStream, port: u16) -> std::io::Result<()> {
    write!(
        out,
        "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\
         WWW-Authenticate: Bearer realm=\"http://localhost:{port}/endless-token\",service=\"x\"\r\n\r\n"
    )
}

fn flood(
    mut out: &TcpStream,
    status: &str,
    ended: &AtomicBool,
    taken: &AtomicU64,
) -> std::io::Result<()> {
    write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n\
         Connection: close\r\n\r\n"
    )?;
    let block = vec![b'['; 64 << 10];
    while !ended.load(Ordering::Relaxed) {
        out.write_all(&block)?;
        taken.fetch_add(block.len() as u64, Ordering::Relaxed);
    }
    Err(std::io::ErrorKind::TimedOut.into())
}

/// Pods whose images come from the hostile registry, and one whose image comes from an honest one.
pub(crate) struct Pulls<'a> {
    hostile: &'a Hostile,
    _honest: Registry,
    _folder: tempfile::TempDir,
}

impl<'a> Pulls<'a> {
    pub(crate) fn start(node: &Node, hostile: &'a Hostile) -> Pulls<'a> {
        let mut manifest = String::new();
        for number in 0..SLOW_PULLS {
            let image = hostile.image("localhost", &format!("slow{number}"));
            manifest += &pod(&format!("slow{number}"), &image, "");
        }
        for name in ["endless", "token", "error"] {
            manifest += &pod(
                &format!("pull-{name}"),
                &hostile.image("127.0.0.1", &format!("{name}/x")),
                "",
            );
        }
        node.apply(&manifest).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let honest = Registry::start(folder.path()).unwrap();
        let archive = folder.path().join("image.tar");
        let spec = ImageSpec {
            name: "localhost/honest:1".into(),
            cmd: vec!["sleep".into(), "100000".into()],
            ..ImageSpec::default()
        };
        write_busybox_archive(&spec, &archive).unwrap();
        honest.push(&archive, "honest:1").unwrap();
        node.kubectl(&[
            "create",
            "secret",
            "docker-registry",
            "honest",
            &format!("--docker-server={}", honest.host()),
            &format!("--docker-username={}", keelson_tests::registry::USER),
            &format!("--docker-password={}", keelson_tests::registry::PASSWORD),
        ])
        .unwrap();
        let secret = "imagePullSecrets: [{ name: honest }]";
        let image = format!("{}/honest:1", honest.host());
        node.apply(&pod("honest", &image, secret)).unwrap();
        Pulls { hostile, _honest: honest, _folder: folder }
    }

    pub(crate) fn an_ordinary_pull_is_not_delayed(&self, node: &Node) {
        node.wait_for("pod/honest", "condition=Ready").unwrap();
    }

    pub(crate) fn end(&self, node: &Node) {
        for name in ["endless", "token", "error"] {
            let pod = format!("pull-{name}");
            let reason = "jsonpath={.status.containerStatuses[0].state.waiting.reason}";
            until(&format!("the pull of {name} failed"), || {
                let reason = node.kubectl(&["get", "pod", &pod, "-o", reason]).unwrap();
                let failed = ["ErrImagePull", "ImagePullBackOff"].contains(&reason.as_str());
                if failed { Ok(()) } else { Err(reason) }
            });
            let message = "jsonpath={.status.containerStatuses[0].state.waiting.message}";
            let message = node.kubectl(&["get", "pod", &pod, "-o", message]).unwrap();
            assert!(message.len() <= 4096, "{} bytes of message", message.len());
        }
        let taken = self.hostile.taken.load(Ordering::Relaxed);
        println!("the node took {taken} bytes of endless answers");
        assert!(taken < MUCH, "the node took {taken} bytes of endless answers");
        // The slow ones are deleted while they are pulled.
        node.kubectl(&["delete", "pods", "-l", "kind=pull", "--wait"]).unwrap();
    }
}

fn pod(name: &str, image: &str, more: &str) -> String {
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, labels: {{ kind: pull }} }}
spec:
  terminationGracePeriodSeconds: 0
  {more}
  containers: [{{ name: main, image: "{image}" }}]
"#
    )
}
