//! The number by which BPF programs know a network namespace.
//!
//! Sockets tell it since Linux 5.14. Before, a program does that is there for as long as one socket is made.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use aya::EbpfLoader;
use aya::maps::HashMap;
use aya::programs::{CgroupAttachMode, CgroupSock};
use keelson_netlink::netns::{Netns, NetnsError};

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a namespace's number is not known.
#[derive(Debug, thiserror::Error)]
#[allow(unreachable_pub, reason = "tests of the programs use this file, too")]
pub enum CookieError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("a BPF program in the cgroup {cgroup} that says it is refused")]
    Program { cgroup: PathBuf, source: Source },
    #[error("the BPF program that says it was not called")]
    NotCalled,
}

/// The number of a namespace. `cgroup` is one that the calling process is in, or below.
pub(crate) fn cookie(netns: &Netns, cgroup: &Path) -> Result<u64, CookieError> {
    match netns.cookie() {
        Err(error) if error.source.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            told_by_program(netns, cgroup)
        }
        known => Ok(known?),
    }
}

/// As sockets of older kernels do not tell it.
pub(crate) fn told_by_program(netns: &Netns, cgroup: &Path) -> Result<u64, CookieError> {
    let said = ask(netns, cgroup);
    said.map_err(|source| CookieError::Program { cgroup: cgroup.to_owned(), source })?
        .ok_or(CookieError::NotCalled)
}

fn ask(netns: &Netns, cgroup: &Path) -> Result<Option<u64>, Source> {
    let load = || EbpfLoader::new().load(keelson_ebpf_objects::NAMESPACE);
    let mut loaded = keelson_ebpf_objects::undisturbed(load)??;
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let program = loaded.program_mut("sock_create").ok_or_else(missing)?;
    keelson_ebpf_objects::load(program)?;
    let program: &mut CgroupSock = program.try_into()?;
    // Detached when `loaded` goes. With a link, this mode is the one that lives beside others.
    program.attach(std::fs::File::open(cgroup)?, CgroupAttachMode::Single)?;
    let socket = netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    let number = number(&socket)?;
    let namespaces = loaded.map("namespaces").ok_or_else(missing)?;
    let namespaces: HashMap<_, u64, u64> = HashMap::try_from(namespaces)?;
    Ok(namespaces.get(&number, 0).ok())
}

/// The number by which programs know a socket.
#[expect(unsafe_code, reason = "nix has no SO_COOKIE")]
fn number(socket: &UdpSocket) -> io::Result<u64> {
    let (mut number, mut length) = (0_u64, 8);
    // SAFETY: the kernel writes at most `length` bytes, those of `number`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(number) } else { Err(io::Error::last_os_error()) }
}
