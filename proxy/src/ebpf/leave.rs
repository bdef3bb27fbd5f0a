//! How the mode ends: at once, or with the last connection whose packets it translates.

use std::time::Duration;

use keelson_ebpf_abi::{Flow, PROTOCOL_UDP, Tuple};

use super::alarm::monotonic_ns;
use super::attach::Links;
use super::config::{is_bpffs, unmount_cgroup2};
use super::error::EbpfError;
use super::item::Operations;
use super::maps::Maps;
use super::observed::Observed;
use super::programs::{self, Programs};
use super::table::Table;
use super::{Ebpf, EbpfConfig, aside, netfilter};
use crate::switch::with_sources;

impl Ebpf {
    /// Removes everything, also what another process left.
    pub(crate) fn remove(config: &EbpfConfig) -> Result<(), EbpfError> {
        let fail = |source| EbpfError::Pin { path: config.pins.clone(), source };
        netfilter::remove()?;
        if !is_bpffs(&config.pins) {
            return Ok(());
        }
        // Sockets and packets first: without maps they would be refused what they may have.
        Links::remove_all(&config.pins)?;
        programs::remove(&config.pins).map_err(fail)?;
        unmount_cgroup2();
        Ok(())
    }

    /// As [`Ebpf::remove`], for a node that goes on in another mode: sockets that are connected stay so, and packets of
    /// connections that were translated go on being translated until they end.
    pub(crate) fn leave(config: &EbpfConfig) -> Result<(), EbpfError> {
        let folder = Programs::maps_folder(&config.pins);
        let Ok(maps) = Maps::open(&folder) else { return Self::remove(config) };
        // The mode that follows translates, too.
        netfilter::remove()?;
        Links::remove_sockets(&config.pins);
        forget_services(&maps)?;
        let flows = Table::open(&folder, "flows_in")?;
        if !goes_on(&flows)? {
            return Self::remove(config);
        }
        tracing::info!("The eBPF mode goes when the connections that it translates have ended");
        let config = config.clone();
        aside("proxy-ebpf-leave", move || see_off(&config, &maps, &flows))
    }
}

/// Waits for the last connection, unless the mode is in use again before.
fn see_off(config: &EbpfConfig, maps: &Maps, flows: &Table<Tuple, Flow>) {
    const PERIOD: Duration = Duration::from_secs(10);
    while goes_on(flows).unwrap_or(false) {
        std::thread::park_timeout(PERIOD);
    }
    let unused = maps.frontends.read().is_ok_and(|found| found.is_empty())
        && Maps::open(&Programs::maps_folder(&config.pins)).is_ok();
    if unused && let Err(error) = Ebpf::remove(config) {
        tracing::warn!(error = with_sources(&error), "Cannot remove what the eBPF mode left");
    }
}

/// Whether there is a connection that another mode could not go on with. UDP flows begin anew there.
fn goes_on(flows: &Table<Tuple, Flow>) -> Result<bool, EbpfError> {
    let now = monotonic_ns()?;
    let lasts = |(key, flow): (&Tuple, &Flow)| key.protocol != PROTOCOL_UDP && !flow.is_over(now);
    Ok(flows.read()?.iter().any(lasts))
}

/// No connection finds a Service any more.
fn forget_services(maps: &Maps) -> Result<(), EbpfError> {
    let ranges = maps.service_ranges.read()?;
    ranges.keys().try_for_each(|range| maps.service_ranges.delete(range))?;
    let deletes = Observed::read(maps)?.leftovers();
    maps.perform(&Operations { puts: Vec::new(), deletes })
}
