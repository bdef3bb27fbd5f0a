//! Ends connected UDP sockets whose endpoint is gone, on a thread of its own: on a node with many pods it takes a while.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use keelson_ebpf_abi::{MemberKey, Peer};
use keelson_netlink::netns;

use super::aside;
use super::connected_udp::Orphans;
use super::error::EbpfError;
use super::table::Table;
use crate::switch::with_sources;

/// The thread's door.
pub(crate) struct Ender {
    sender: Sender<()>,
}

impl Ender {
    /// Works on the maps in that folder, until dropped.
    pub(crate) fn start(maps: &Path, folders: Vec<PathBuf>) -> Result<Self, EbpfError> {
        let members: Table<MemberKey, u32> = Table::open(maps, "members")?;
        let connected: Table<u64, Peer> = Table::open(maps, "connected_udp")?;
        let (sender, inbox) = channel();
        let work = move || {
            while let Ok(()) = inbox.recv() {
                // What came meanwhile is seen as well.
                while inbox.try_recv().is_ok() {}
                if let Err(error) = end_orphans(&members, &connected, &folders) {
                    let error = with_sources(&error);
                    tracing::error!(%error, "Cannot end UDP sockets whose endpoint is gone");
                }
            }
        };
        aside("proxy-udp-sockets", work)?;
        Ok(Ender { sender })
    }

    /// Members of pools are gone.
    pub(crate) fn look(&self) {
        if self.sender.send(()).is_err() {
            tracing::error!("Nobody ends UDP sockets whose endpoint is gone");
        }
    }
}

fn end_orphans(
    members: &Table<MemberKey, u32>,
    connected: &Table<u64, Peer>,
    folders: &[PathBuf],
) -> Result<(), EbpfError> {
    let connected_now = connected.read()?;
    let is_member = |member: &MemberKey| matches!(members.get(member), Ok(Some(_)) | Err(_));
    let orphans = Orphans::among(connected_now, is_member);
    let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let ended = orphans.end(std::iter::once_with(|| netns::existing(&folders)).flatten());
    for trouble in &ended.troubles {
        tracing::warn!(error = with_sources(trouble), "Some UDP sockets keep a dead endpoint");
    }
    if ended.count > 0 {
        tracing::info!(sockets = ended.count, "Ended connected UDP sockets whose endpoint is gone");
    }
    for (cookie, peer) in ended.settled {
        if connected.get(&cookie)? == Some(peer) {
            connected.replace(&cookie, &peer.ended())?;
        }
    }
    Ok(())
}
