//! Registries that answer without end, slowly, or with lies.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A server on loopback; `answer` gets the path of each request. Gives its address and the bytes that clients took.
fn server(
    answer: impl Fn(&str, &mut dyn FnMut(&[u8]) -> bool) + Send + Sync + 'static,
) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let taken = Arc::new(AtomicUsize::new(0));
    let (count, answer) = (taken.clone(), Arc::new(answer));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (count, answer) = (count.clone(), answer.clone());
            std::thread::spawn(move || {
                let path = request(&stream);
                let mut write = |bytes: &[u8]| {
                    count.fetch_add(bytes.len(), Ordering::Relaxed);
                    (&stream).write_all(bytes).is_ok()
                };
                answer(&path, &mut write);
            });
        }
    });
    (host, taken)
}

fn request(stream: &TcpStream) -> String {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    first.split(' ').nth(1).unwrap_or_default().to_owned()
}

fn registry(host: &str) -> Registry {
    drop(rustls::crypto::ring::default_provider().install_default());
    Registry::new(host, "team/app", true, Some(("u".into(), "p".into()))).unwrap()
}

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
/// What the kernel's buffers may hold beyond what was read.
const BUFFERS: usize = 16 << 20;

fn endless(write: &mut dyn FnMut(&[u8]) -> bool) {
    let block = vec![b'['; 64 << 10];
    while write(&block) {}
}

#[tokio::test]
async fn an_endless_manifest_is_read_up_to_the_limit() {
    let (host, taken) = server(|_, write| {
        write(HEAD);
        endless(write);
    });
    let error = registry(&host).manifest("1", "*/*").await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    assert!(taken.load(Ordering::Relaxed) < LARGEST_MANIFEST + BUFFERS);
}

#[tokio::test]
async fn an_endless_token_and_an_endless_error_are_read_up_to_the_limit() {
    let (realm, taken) = server(|_, write| {
        write(HEAD);
        endless(write);
    });
    let (host, more) = server(move |path, write| {
        if path.contains("token") {
            let challenge = format!("Bearer realm=\"http://{realm}/t\",service=\"s\"");
            let head = format!(
                "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: {challenge}\r\n\
                 Content-Length: 0\r\nConnection: close\r\n\r\n"
            );
            write(head.as_bytes());
        } else {
            write(b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n");
            endless(write);
        }
    });
    let error = registry(&host).manifest("token", "*/*").await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    let error = registry(&host).manifest("error", "*/*").await.unwrap_err();
    assert!(error.to_string().contains("500"), "{error}");
    let taken = taken.load(Ordering::Relaxed) + more.load(Ordering::Relaxed);
    assert!(taken < LARGEST_TOKEN + LARGEST_ERROR + 2 * BUFFERS, "{taken}");
}

#[tokio::test]
async fn a_token_is_fetched_and_shown_and_errors_are_told_in_short() {
    let (host, _) = server(|path, write| {
        if path.starts_with("/token?") {
            assert!(path.contains("scope=repository%3Ateam%2Fapp%3Apull"), "{path}");
            write(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{\"token\":\"t\"}");
            return;
        }
        let text = "x".repeat(5000);
        let body = format!("{{\"errors\":[{{\"code\":\"DENIED\",\"message\":\"{text}\"}}]}}");
        let head = format!(
            "HTTP/1.1 403 Forbidden\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        write(head.as_bytes());
        write(body.as_bytes());
    });
    let registry = registry(&host);
    registry.fetch_token(&format!("http://{host}/token"), None, None).await.unwrap();
    let known = registry.authorization.lock().unwrap().clone().unwrap();
    assert_eq!(known, "Bearer t");
    let error = registry.manifest("1", "*/*").await.unwrap_err().to_string();
    assert!(error.contains("403 Forbidden: DENIED: xxx") && error.len() < 1200, "{error}");
}

#[tokio::test]
async fn a_password_goes_to_no_realm_without_tls() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let login = Some(("u".into(), "p".into()));
    let registry = Registry::new("registry.example", "team/app", false, login).unwrap();
    for realm in ["http://registry.example/t", "file:///etc/passwd", "nonsense"] {
        let error = registry.fetch_token(realm, None, None).await.unwrap_err();
        assert!(matches!(error, RegistryError::Challenge(_)), "{error}");
    }
}

#[tokio::test]
async fn a_layer_that_is_longer_than_declared_is_cut_off() {
    let (host, taken) = server(|_, write| {
        write(HEAD);
        endless(write);
    });
    let parts = registry(&host).blob("sha256:0", 1000).await.unwrap();
    let parts: Vec<_> = parts.collect().await;
    assert!(parts.last().unwrap().as_ref().unwrap_err().contains("more than the 1000 bytes"));
    assert!(parts.iter().flatten().map(Vec::len).sum::<usize>() <= 1000);
    assert!(taken.load(Ordering::Relaxed) < BUFFERS);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_comes_byte_by_byte_ends_for_want_of_progress() {
    let began = Instant::now();
    let drip = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_secs(50)).await;
        Some((Ok(Bytes::from_static(b"x")), ()))
    });
    let parts: Vec<_> = no_more_than(drip.boxed(), u64::MAX, "d".into()).collect().await;
    assert!(parts.last().unwrap().is_err());
    assert_eq!(began.elapsed(), PROGRESS_LIMIT);
}
