//! Links between programs and what they are attached to. Pinned: they outlive the process, and a new
//! program takes an old one's place between two packets.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;

use super::clsact;
use super::error::EbpfError;
use super::programs::Programs;
use super::refusals::Refusals;
use super::sys::{self, AttachType};

/// Programs for sockets, and where they are called.
pub(crate) const SOCKET_PROGRAMS: &[(&str, AttachType)] = &[
    // Before those that remember sockets: it takes them away again.
    ("sock_release", AttachType::SockRelease),
    ("connect4", AttachType::Connect4),
    ("connect6", AttachType::Connect6),
    ("sendmsg4", AttachType::SendMsg4),
    ("sendmsg6", AttachType::SendMsg6),
    ("recvmsg4", AttachType::RecvMsg4),
    ("recvmsg6", AttachType::RecvMsg6),
    ("getpeername4", AttachType::GetPeerName4),
    ("getpeername6", AttachType::GetPeerName6),
];
/// Programs for packets, in the order in which they are attached.
pub(crate) const PACKET_PROGRAMS: &[(&str, AttachType)] =
    &[("egress", AttachType::TcxEgress), ("ingress", AttachType::TcxIngress)];

/// How packets come to the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By links, from Linux 6.6 on.
    Tcx,
    Clsact,
}

/// The interface of that number in every network namespace.
const LOOPBACK: u32 = 1;

impl Way {
    /// Fails where packets do not come to the programs: tried where there are none.
    pub(crate) fn try_out(programs: &Programs) -> Result<(), EbpfError> {
        let netns = Netns::anonymous()?;
        let interfaces = HashSet::from([LOOPBACK]);
        let mut refused = Vec::new();
        match Way::find(programs, &netns)? {
            Way::Tcx => Ok(()),
            Way::Clsact => {
                clsact::serve(&netns, programs, &interfaces, &mut refused)?;
                refused.pop().map_or(Ok(()), |refused| Err(refused.error))
            }
        }
    }

    /// What the kernel of that namespace can do: tried with the loopback interface.
    pub(crate) fn find(programs: &Programs, netns: &Netns) -> Result<Self, EbpfError> {
        const PROGRAM: &str = "egress";
        let Some(program) = programs.get(PROGRAM) else { return Ok(Way::Tcx) };
        let attempt = || sys::create_link(program.as_fd(), LOOPBACK, AttachType::TcxEgress);
        match netns.run(attempt)? {
            // Detached again as nobody holds it.
            Ok(_) => Ok(Way::Tcx),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Way::Clsact),
            Err(source) => {
                let target = "the loopback interface".to_owned();
                Err(EbpfError::Attach { program: PROGRAM, target, source })
            }
        }
    }
}

/// An interface that did not take a program.
pub(super) struct Refused {
    pub(super) program: &'static str,
    pub(super) index: u32,
    pub(super) error: EbpfError,
}

/// The pinned links.
pub(crate) struct Links {
    folder: PathBuf,
}

impl Links {
    pub(crate) fn open(pins: &Path) -> Result<Self, EbpfError> {
        let folder = pins.join("links");
        let fail = |source| EbpfError::Pin { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(fail)?;
        Ok(Links { folder })
    }

    /// Attaches the programs for sockets, and says how much had to be done.
    pub(crate) fn serve_sockets(
        &self,
        programs: &Programs,
        cgroup: &Path,
        refusals: &mut Refusals,
    ) -> Result<usize, EbpfError> {
        let read = |source| EbpfError::Read { path: cgroup.to_owned(), source };
        let folder = File::open(cgroup).map_err(read)?;
        let number = folder.metadata().map_err(read)?.ino();
        let mut operations = 0;
        for (name, attach_type) in SOCKET_PROGRAMS {
            let Some(program) = programs.get(name) else { continue };
            let create = || {
                sys::create_link(program.as_fd(), folder.as_raw_fd().unsigned_abs(), *attach_type)
            };
            let fail = |source| {
                let target = cgroup.display().to_string();
                EbpfError::Attach { program: name, target, source }
            };
            match self.ensure(name, program, number, create) {
                Ok(changed) => operations += usize::from(changed),
                Err(error) => refusals.add(name, "sockets that connect", &fail(error)),
            }
        }
        Ok(operations)
    }

    /// Attaches the programs for packets to interfaces of that namespace, and says how much had to be done.
    pub(crate) fn serve_packets(
        &self,
        programs: &Programs,
        way: Way,
        netns: &Netns,
        interfaces: &HashSet<u32>,
        refusals: &mut Refusals,
    ) -> Result<usize, EbpfError> {
        let mut refused = Vec::new();
        let operations = match way {
            Way::Tcx => self.link_packets(programs, netns, interfaces, &mut refused),
            Way::Clsact => clsact::serve(netns, programs, interfaces, &mut refused)?,
        };
        if !refused.is_empty() {
            // Those that are gone meanwhile need nothing.
            let links = Rtnl::open_in(netns)?.links().map_err(EbpfError::Observe)?;
            for Refused { program, index, error } in refused {
                if let Some(link) = links.iter().find(|link| link.index == index) {
                    let what = format!("interface {}, {program}", link.name);
                    refusals.add(&pin(program, index), &what, &error);
                }
            }
        }
        Ok(operations)
    }

    fn link_packets(
        &self,
        programs: &Programs,
        netns: &Netns,
        interfaces: &HashSet<u32>,
        refused: &mut Vec<Refused>,
    ) -> usize {
        let mut operations = 0;
        for (name, attach_type) in PACKET_PROGRAMS {
            let Some(program) = programs.get(name) else { continue };
            for index in interfaces {
                let create = || sys::create_link(program.as_fd(), *index, *attach_type);
                // An index counts in the thread's own namespace.
                let create = || netns.run(create).map_err(io::Error::other)?;
                match self.ensure(&pin(name, *index), program, (*index).into(), create) {
                    Ok(changed) => operations += usize::from(changed),
                    Err(source) => {
                        let target = format!("interface {index}");
                        let error = EbpfError::Attach { program: name, target, source };
                        refused.push(Refused { program: name, index: *index, error });
                    }
                }
            }
        }
        operations
    }

    /// Makes sure that a link is there, works, and leads to that program; true when something had to be done.
    pub(super) fn ensure(
        &self,
        pin: &str,
        program: &OwnedFd,
        target: u64,
        create: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<bool> {
        let path = self.folder.join(pin);
        if let Ok(link) = sys::open_pinned(&path) {
            let info = sys::link_info(link.as_fd())?;
            if info.is_attached_to(target) {
                if info.program == sys::program_id(program.as_fd())? {
                    return Ok(false);
                }
                sys::update_link(link.as_fd(), program.as_fd())?;
                return Ok(true);
            }
        }
        let link = create()?;
        if path.exists() {
            fs::remove_file(&path)?;
        }
        sys::pin(link.as_fd(), &path)?;
        Ok(true)
    }

    /// The links that should be there and are not, or lead nowhere.
    pub(crate) fn missing(
        &self,
        sockets: bool,
        interfaces: impl Iterator<Item = u32>,
        way: Way,
        netns: &Netns,
    ) -> Vec<String> {
        let sockets =
            SOCKET_PROGRAMS.iter().filter(|_| sockets).map(|(name, _)| (*name).to_owned());
        let missing = |pin: &String| !self.works(pin);
        if way == Way::Clsact
            && let Ok(mut rtnl) = Rtnl::open_in(netns)
        {
            let filters = clsact::missing(&mut rtnl, interfaces);
            return sockets.filter(missing).chain(filters).collect();
        }
        sockets.chain(packets(interfaces)).filter(missing).collect()
    }

    pub(super) fn works(&self, pin: &str) -> bool {
        let link = sys::open_pinned(&self.folder.join(pin));
        link.is_ok_and(|link| sys::link_info(link.as_fd()).is_ok_and(|info| info.is_attached()))
    }

    /// Detaches what is not wanted: from interfaces that are gone, or from sockets.
    pub(crate) fn remove_others(&self, sockets: bool, interfaces: &HashSet<u32>) -> usize {
        let wanted = |name: &str| match name.rsplit_once('-') {
            // Others' business.
            Some((program, _)) if program.starts_with("xdp_") => true,
            Some((_, index)) => index.parse().is_ok_and(|index| interfaces.contains(&index)),
            None => sockets,
        };
        remove(&self.folder, |name| !wanted(name))
    }

    /// Detaches what has such a name, and says how much that was.
    pub(super) fn remove_where(&self, which: impl Fn(&str) -> bool) -> usize {
        remove(&self.folder, which)
    }

    /// Detaches the programs for sockets that any process attached for these pins.
    pub(crate) fn remove_sockets(pins: &Path) {
        remove(&pins.join("links"), |name| {
            SOCKET_PROGRAMS.iter().any(|(socket, _)| *socket == name)
        });
    }

    /// Detaches everything that any process attached for these pins, and the filters of the calling thread's namespace.
    pub(crate) fn remove_all(pins: &Path) -> Result<(), EbpfError> {
        remove(&pins.join("links"), |_| true);
        let mut rtnl = Rtnl::open().map_err(EbpfError::Observe)?;
        clsact::remove(&mut rtnl).map_err(EbpfError::Filter)
    }
}

/// The pins of links to interfaces.
fn packets(interfaces: impl Iterator<Item = u32>) -> impl Iterator<Item = String> {
    interfaces.flat_map(|index| PACKET_PROGRAMS.iter().map(move |(name, _)| pin(name, index)))
}

/// The name of the pin of a link to an interface.
pub(super) fn pin(program: &str, index: u32) -> String {
    format!("{program}-{index}")
}

fn remove(folder: &Path, which: impl Fn(&str) -> bool) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let others = entries.filter(|entry| which(&entry.file_name().to_string_lossy()));
    let removed = others.filter(|entry| match detach(&entry.path()) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(path = %entry.path().display(), %error, "Cannot detach a program");
            false
        }
    });
    removed.count()
}

fn detach(path: &Path) -> io::Result<()> {
    let link = sys::open_pinned(path)?;
    if let Err(error) = sys::detach_link(link.as_fd()) {
        // What it was attached to is gone.
        tracing::debug!(path = %path.display(), %error, "Nothing to detach");
    }
    fs::remove_file(path)
}
