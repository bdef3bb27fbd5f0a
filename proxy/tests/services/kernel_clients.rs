//! The kernel itself as a client: of file servers that are mounted through Services. Case 59.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::stage::*;

rows![a_file_system_is_asked_for_through_a_service,];

/// Only kills a row that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Its sockets are made by threads of the kernel, which are in no node's cgroup: packets alone can serve them.
fn a_file_system_is_asked_for_through_a_service(mode: Mode) {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains("nfs4") {
        skip("this kernel has no NFS");
    }
    let mut node = Node::new(mode);
    let server = node.pod("files", 2);
    let listener = server.namespace.run(|| TcpListener::bind("[::]:2049").unwrap());
    node.service("files", cluster_ip(1, "TCP", 2049));
    node.ready("files", "TCP", 2049, &[2]);
    node.apply();
    let folder = tempfile::tempdir().unwrap();
    let mounted = std::thread::scope(|scope| {
        let mounting = scope.spawn(|| {
            let how = "vers=4.1,proto=tcp,soft,timeo=50,retrans=1,port=2049,addr=10.96.0.1,clientaddr=203.0.113.2";
            node.namespace.run(|| {
                let none = MsFlags::empty();
                mount(Some("10.96.0.1:/"), folder.path(), Some("nfs4"), none, Some(how))
            })
        });
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut waiting, patience), Ok(1), "the kernel did not come");
        let (client, from) = listener.accept().unwrap();
        // Such clients come from privileged ports, which servers may insist on.
        assert!(from.port() < 1024, "{from}");
        decline(client);
        mounting.join().unwrap()
    });
    assert!(mounted.is_err_and(|error| error != Errno::ETIMEDOUT), "{mounted:?}");
}

/// Answers a call: there is no such program here (RFC 5531).
fn decline(mut client: TcpStream) {
    const FILES: u32 = 100_003;
    const REPLY: u32 = 1;
    const NO_SUCH_PROGRAM: u32 = 1;
    const LAST: u32 = 1 << 31;
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut call = [0; 20];
    client.read_exact(&mut call).unwrap();
    let word = |i: usize| u32::from_be_bytes(call[4 * i..4 * i + 4].try_into().unwrap());
    let (number, program) = (word(1), word(4));
    assert_eq!(program, FILES);
    // Accepted, without a verifier.
    let answer = [LAST | 24, number, REPLY, 0, 0, 0, NO_SUCH_PROGRAM];
    let answer: Vec<u8> = answer.iter().flat_map(|word| word.to_be_bytes()).collect();
    client.write_all(&answer).unwrap();
}
