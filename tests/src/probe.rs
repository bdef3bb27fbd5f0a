//! Callers that count what they lose while something happens to a node.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::Result;

use crate::netns;

/// An answer that takes longer counts as lost.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// What a probe has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub answered: u64,
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answered: AtomicU64,
    lost: AtomicU64,
}

impl Shared {
    /// A Service may come into force after its probe: what fails before the first answer is not counted.
    fn count<T>(&self, answer: &io::Result<T>) {
        match answer {
            Ok(_) => {
                self.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) if self.answered.load(Ordering::Relaxed) == 0 => {}
            Err(error) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                eprintln!("{:?}: a connection was lost: {error}", SystemTime::now());
            }
        }
    }

    fn counts(&self) -> Counts {
        Counts {
            answered: self.answered.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// A caller in a network namespace, on a thread of its own.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

impl Probe {
    /// Fetches a page through a new connection, again and again; it must hold `text`.
    pub fn of_new_connections(netns: &str, address: SocketAddr, text: &'static str) -> Probe {
        Probe::start(netns, move |shared| {
            while shared.goes_on() {
                shared.count(&page(&address, text));
                std::thread::sleep(PAUSE);
            }
        })
    }

    /// Keeps one connection to a server that sends back what it gets. A connection that breaks is opened again and
    /// counts as lost.
    pub fn of_one_connection(netns: &str, address: SocketAddr) -> Probe {
        Probe::start(netns, move |shared| {
            let mut kept = None;
            while shared.goes_on() {
                let echoed = match kept.take() {
                    Some(stream) => Ok(stream),
                    None => open(&address),
                }
                .and_then(echo);
                shared.count(&echoed);
                kept = echoed.ok();
                std::thread::sleep(PAUSE);
            }
        })
    }

    fn start(netns: &str, work: impl FnOnce(&Shared) + Send + 'static) -> Probe {
        let shared = Arc::new(Shared::default());
        let own = shared.clone();
        let thread = netns::spawn_in(netns, move || {
            work(&own);
            Ok(())
        });
        Probe { shared, thread }
    }

    /// What the caller has seen until now.
    pub fn counts(&self) -> Counts {
        self.shared.counts()
    }

    /// Ends the caller and gives what it has seen.
    ///
    /// # Errors
    /// When its namespace could not be entered.
    ///
    /// # Panics
    /// When its thread panicked.
    pub fn end(self) -> Result<Counts> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(ended) => ended?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(self.shared.counts())
    }
}

fn open(address: &SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn page(address: &SocketAddr, text: &str) -> io::Result<()> {
    let mut stream = open(address)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    if page.contains(text) { Ok(()) } else { Err(io::Error::other(format!("got {page:?}"))) }
}

fn echo(mut stream: TcpStream) -> io::Result<TcpStream> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
