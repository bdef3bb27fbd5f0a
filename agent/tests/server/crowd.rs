//! Many connections that say little, from many addresses.
#![allow(dead_code, reason = "each user of the crowd needs its own part")]

use std::net::{Ipv4Addr, SocketAddr};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

/// What a member of the crowd says before it falls silent: nothing, half of a TLS record, no TLS.
const WORDS: [&[u8]; 3] = [b"", &[0x16, 3, 1, 2, 0, 1, 0], b"GET / HTTP/1.1\r\n"];

/// Lets this process have the descriptors of a crowd.
pub fn allow_descriptors(count: u64) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= count, "needs a limit of {count} descriptors, the hard one is {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(count), hard).unwrap();
}

/// Connects `count` times, 40 times from each address.
pub async fn connect(to: SocketAddr, count: u32) -> Vec<TcpStream> {
    let mut crowd = Vec::new();
    for (n, words) in (0..count).zip(WORDS.iter().cycle()) {
        let socket = TcpSocket::new_v4().unwrap();
        let from = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + n / 40);
        socket.bind((from, 0).into()).unwrap();
        let mut stream = socket.connect(to).await.unwrap();
        stream.write_all(words).await.unwrap();
        crowd.push(stream);
    }
    crowd
}

/// Resident memory of this process, in bytes.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}
