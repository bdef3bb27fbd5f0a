//! Pods, the servers on them, and how clients ask.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Namespace, silence};

/// Only kills a test that hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// A pod with servers on it that tell their name and who asked.
pub(crate) struct Pod {
    pub(crate) namespace: Namespace,
    pub(crate) name: String,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    pub(super) servers: Vec<Server>,
}

pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers who connects there.
    pub(crate) fn on(listener: TcpListener, name: &str) -> Server {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_owned());
        let thread = std::thread::spawn(move || serve_tcp(&listener, &name, &stopped));
        Server { stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) server: String,
    /// The client's address as the server saw it.
    pub(crate) client: IpAddr,
}

pub(crate) type Outcome = Result<Answer, ErrorKind>;

fn parse(text: &str) -> Answer {
    let (server, client) = text.trim().split_once(' ').unwrap();
    Answer { server: server.to_owned(), client: client.parse().unwrap() }
}

impl Namespace {
    /// Connects, reads the answer.
    pub(crate) fn tcp(&self, to: &str) -> Outcome {
        self.ask_for("TCP", to, silence())
    }

    pub(crate) fn udp(&self, to: &str) -> Outcome {
        self.ask_for("UDP", to, silence())
    }

    /// Asks, and takes it for silence when nothing comes for so long.
    pub(crate) fn ask_for(&self, protocol: &str, to: &str, patience: Duration) -> Outcome {
        if protocol == "UDP" {
            return self.run(|| udp_exchange(&self.udp_socket(to), patience));
        }
        let to: SocketAddr = to.parse().unwrap();
        self.run(|| {
            let mut stream = TcpStream::connect_timeout(&to, patience).map_err(|e| e.kind())?;
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|e| e.kind())?;
            // Accepted by somebody who passes connections on, but could not.
            if text.is_empty() { Err(ErrorKind::UnexpectedEof) } else { Ok(parse(&text)) }
        })
    }

    /// Status line, headers and body that a web server answers.
    pub(crate) fn get(&self, server: &str, path: &str) -> String {
        self.try_get(server, path).unwrap()
    }

    pub(crate) fn try_get(&self, server: &str, path: &str) -> std::io::Result<String> {
        let server: SocketAddr = server.parse().unwrap();
        self.run(|| {
            let mut stream = TcpStream::connect_timeout(&server, DEADLINE)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// A connected UDP socket that keeps its source port.
    pub(crate) fn udp_socket(&self, to: &str) -> UdpSocket {
        let to: SocketAddr = to.parse().unwrap();
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        self.run(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket
        })
    }

    pub(crate) fn ask(&self, protocol: &str, to: &str) -> Outcome {
        self.ask_for(protocol, to, silence())
    }

    /// Serves until dropped.
    pub(crate) fn serve(&self, name: &str, protocol: &str, port: u16) -> Server {
        let address: SocketAddr = SocketAddr::new("::".parse().unwrap(), port);
        if protocol != "UDP" {
            return Server::on(self.run(|| TcpListener::bind(address).unwrap()), name);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_owned());
        let socket = self.run(|| UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let thread = std::thread::spawn(move || serve_udp(&socket, &name, &stopped));
        Server { stop, thread: Some(thread) }
    }
}

pub(crate) fn udp_exchange(socket: &UdpSocket, patience: Duration) -> Outcome {
    socket.set_read_timeout(Some(patience)).unwrap();
    match socket.send(b"?") {
        // Refused on its way out of this very host: the reason comes with the receive.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        sent => {
            sent.map_err(|e| e.kind())?;
        }
    }
    let mut buffer = [0; 200];
    let length = socket.recv(&mut buffer).map_err(|e| e.kind())?;
    Ok(parse(std::str::from_utf8(&buffer[..length]).unwrap()))
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 200];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let answer = format!("{name} {}", from.ip().to_canonical());
            drop(socket.send_to(answer.as_bytes(), from));
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    while !stop.load(Ordering::Relaxed) {
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::from(50u8)).unwrap_or(0) == 0 {
            continue;
        }
        if let Ok((mut stream, from)) = listener.accept() {
            drop(write!(stream, "{name} {}", from.ip().to_canonical()));
        }
    }
}

impl Pod {
    pub(crate) fn serving(mut self, protocol: &str, port: u16) -> Self {
        let server = self.namespace.serve(&self.name, protocol, port);
        self.servers.push(server);
        self
    }
}
