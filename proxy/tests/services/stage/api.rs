//! An API server that only knows lists and watches.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

/// Writes a kubeconfig for it.
pub(crate) fn kubeconfig(directory: &Path, port: u16) -> PathBuf {
    let path = directory.join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

/// Answers lists with fixed objects and watches with the events that come through `events`; a `gap` ends
/// all watches, and from then on the lists are those that it brings.
pub(crate) async fn api_server(
    listener: TcpListener,
    lists: Value,
    events: broadcast::Sender<(String, Value)>,
) {
    let lists = Rc::new(RefCell::new(lists));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (lists, posted, events) = (Rc::clone(&lists), events.clone(), events.subscribe());
        tokio::task::spawn_local(async move { drop(answer(stream, lists, events, posted).await) });
    }
}

async fn answer(
    stream: TcpStream,
    lists: Rc<RefCell<Value>>,
    mut events: broadcast::Receiver<(String, Value)>,
    posted: broadcast::Sender<(String, Value)>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if stream.read_line(&mut request).await? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        let mut length = 0;
        while stream.read_line(&mut header).await? > 2 {
            if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            header.clear();
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let path = request.split_whitespace().nth(1).unwrap();
        let kind = path.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
        if !request.starts_with("GET") {
            // Only Events are written; whoever listens gets them like a watch.
            let object: Value = serde_json::from_slice(&body).unwrap();
            drop(posted.send(("posted".to_owned(), object)));
            let head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n";
            let head = format!("{head}Content-Length: {length}\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&body).await?;
            continue;
        }
        if !path.contains("watch=true") {
            let single = path.split('?').next().unwrap().rsplit('/').nth(1).unwrap();
            let lists = lists.borrow().clone();
            let body = match lists.get(single) {
                Some(all) => {
                    all.as_array().unwrap().iter().find(|o| o["metadata"]["name"] == *kind)
                }
                None => None,
            };
            let items = lists.get(&kind).cloned().unwrap_or(json!([]));
            let body = body.cloned().unwrap_or(json!({
                "apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items,
            }));
            let body = body.to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await?;
            continue;
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        while let Ok((wanted, mut event)) = events.recv().await {
            let gap = wanted == "gap";
            if gap {
                *lists.borrow_mut() = event;
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "too old resource version", "reason": "Expired", "code": 410,
                });
                event = json!({"type": "ERROR", "object": status});
            }
            if gap || wanted == kind {
                let text = format!("{event}\n");
                stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
            }
            if gap {
                stream.write_all(b"0\r\n\r\n").await?;
                return Ok(());
            }
        }
        return Ok(());
    }
}
