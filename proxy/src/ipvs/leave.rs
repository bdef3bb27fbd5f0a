//! How the mode ends: at once, or with its last connection.

use std::collections::BTreeSet;
use std::net::IpAddr;

use keelson_netlink::ipvs::{Command, Ipvs as Kernel, Key};
use keelson_netlink::nft::{Nft, NftError};
use keelson_netlink::route::Rtnl;

use super::servers::Servers;
use super::{Ipvs, IpvsError, routing};
use crate::backend::{Backend, BackendConfig, BackendError};
use crate::nftables::{Nftables, NftablesError, Role};

/// The interface that kube-proxy's IPVS mode puts Service addresses on.
pub(crate) const KUBE_PROXYS_LINK: &str = "kube-ipvs0";

impl Ipvs {
    pub(super) fn remove_everything(&mut self) -> Result<(), BackendError> {
        self.alarm.set_clock(false)?;
        self.table.cleanup()?;
        self.remove_own()?;
        self.remove_ways()?;
        self.servers = Servers::default();
        self.programmed.clear();
        self.draining.clear();
        Ok(())
    }

    fn remove_own(&mut self) -> Result<(), IpvsError> {
        const ATTEMPTS: u32 = 5;
        for _ in 0..ATTEMPTS {
            let own = self.own()?;
            if own.is_empty() {
                break;
            }
            let commands: Vec<Command> =
                own.into_iter().map(|own| Command::RemoveVirtual(own.key)).collect();
            self.perform_where_there(&commands)?;
        }
        Ok(())
    }

    /// The last connection of some may have ended meanwhile, and they are gone.
    fn perform_where_there(&mut self, commands: &[Command]) -> Result<(), IpvsError> {
        match self.kernel.perform(commands) {
            Err(error) if !error.is_out_of_step() => Err(IpvsError::Apply(error)),
            _ => Ok(()),
        }
    }

    fn remove_ways(&mut self) -> Result<(), BackendError> {
        self.flows.cleanup()?;
        Ok(routing::remove(&mut self.rtnl).map_err(IpvsError::Routing)?)
    }

    /// Removes everything of this mode. Loads no module for that.
    pub(crate) fn remove() -> Result<(), BackendError> {
        if !was_possible() {
            return Ok(());
        }
        if Kernel::is_loaded() {
            return Ipvs::open(BackendConfig::default())?.cleanup();
        }
        for role in [Role::BesideIpvs, Role::IpvsFlows] {
            if has_table(role)? {
                Nftables::open_as(role, BackendConfig::default())?.cleanup()?;
            }
        }
        let mut rtnl = Rtnl::open().map_err(IpvsError::Routing)?;
        Ok(routing::remove(&mut rtnl).map_err(IpvsError::Routing)?)
    }

    /// As [`Ipvs::remove`], for a node that goes on in another mode: connections through IPVS keep their way until they end.
    pub(crate) fn leave() -> Result<(), BackendError> {
        if !was_possible() || !Kernel::is_loaded() {
            return Ipvs::remove();
        }
        let mut backend = Ipvs::open(BackendConfig::default())?;
        backend.table.cleanup()?;
        // It makes nothing any more.
        backend.scheduler = Some(backend.config.ipvs.scheduler.clone());
        let mut steps = backend.steps()?;
        backend.perform_where_there(&steps.last)?;
        backend.draining.append(&mut steps.draining);
        let draining: Vec<Key> = backend.draining.keys().copied().collect();
        backend.drain(draining.into_iter());
        if backend.draining.is_empty() {
            return backend.remove_ways();
        }
        let left: usize = backend.draining.values().map(BTreeSet::len).sum();
        tracing::info!(
            endpoints = left,
            "Connections through IPVS are left, it goes when they have ended"
        );
        let thread = std::thread::Builder::new().name("proxy-ipvs-leave".to_owned());
        if let Err(error) = thread.spawn(move || backend.see_off()) {
            tracing::warn!(%error, "Cannot wait for the last connection through IPVS");
        }
        Ok(())
    }

    /// Waits for the last connection, unless the mode is in use again before.
    fn see_off(mut self) {
        const PERIOD: std::time::Duration = std::time::Duration::from_secs(1);
        while !self.draining.is_empty() {
            std::thread::park_timeout(PERIOD);
            self.drain_some();
        }
        // A virtual server that is there all the same has been taken into use again.
        let unused = self.own().is_ok_and(|own| own.is_empty());
        if unused && let Err(error) = self.remove_ways() {
            let error = crate::switch::with_sources(&error);
            tracing::warn!(%error, "Cannot remove what led to IPVS");
        }
    }
}

/// Without nf_tables this mode has never been in use.
fn was_possible() -> bool {
    Nft::open().and_then(|mut nft| nft.generation()).is_ok()
}

fn has_table(role: Role) -> Result<bool, IpvsError> {
    let failed = |error: NftError| IpvsError::Table(NftablesError::Observe(error));
    match Nft::open() {
        Ok(mut nft) => Ok(nft.table(role.table()).map_err(failed)?.is_some()),
        Err(error) => Err(failed(error)),
    }
}

/// kube-proxy's virtual servers: those for the addresses that it put on its interface, and those for node ports, which
/// lead to the same real servers. What is ours is not among them.
fn kube_proxys(kernel: &mut Kernel, addresses: &[IpAddr]) -> Result<Vec<Key>, IpvsError> {
    let failed = IpvsError::Observe;
    let all = kernel.virtuals().map_err(failed)?;
    let all = all.into_iter().filter(|found| !super::steps::is_ours(found));
    let (on_link, others): (Vec<_>, Vec<_>) =
        all.partition(|found| addresses.contains(&found.key.address));
    let mut reals = BTreeSet::new();
    for found in &on_link {
        reals.extend(kernel.reals(found.key).map_err(failed)?.iter().map(|real| real.real.at));
    }
    let mut keys: Vec<Key> = on_link.iter().map(|found| found.key).collect();
    for found in others {
        let theirs = kernel.reals(found.key).map_err(failed)?;
        if !theirs.is_empty() && theirs.iter().all(|real| reals.contains(&real.real.at)) {
            keys.push(found.key);
        }
    }
    Ok(keys)
}

/// Removes kube-proxy's virtual servers; how many those were. To be called while its interface is there.
pub(crate) fn remove_kube_proxys() -> Result<usize, IpvsError> {
    let mut rtnl = Rtnl::open().map_err(IpvsError::Routing)?;
    let link = rtnl.link(KUBE_PROXYS_LINK).map_err(IpvsError::Routing)?;
    let Some(link) = link.filter(|_| Kernel::is_loaded()) else { return Ok(0) };
    let addresses = rtnl.addresses(Some(link.index)).map_err(IpvsError::Routing)?;
    let addresses: Vec<IpAddr> = addresses.iter().map(|found| found.network.ip()).collect();
    let mut kernel = Kernel::open().map_err(IpvsError::Open)?;
    let keys = kube_proxys(&mut kernel, &addresses)?;
    let commands: Vec<Command> = keys.into_iter().map(Command::RemoveVirtual).collect();
    kernel.perform(&commands).map_err(IpvsError::Apply)?;
    Ok(commands.len())
}
