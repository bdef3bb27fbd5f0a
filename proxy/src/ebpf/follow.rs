//! Follows the node: its interfaces, addresses and exempt namespaces, and what the programs must know of it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::hash::Hash;
use std::net::IpAddr;

use keelson_ebpf_abi::{ADDRESS_NODE, Address, RangePrefix, Settings};
use keelson_netlink::route::Rtnl;

use super::alarm::monotonic_ns;
use super::direct::Obstacles;
use super::maps::Maps;
use super::node::{self, NodeState};
use super::refusals::Refusals;
use super::sizes::Amounts;
use super::table::Table;
use super::{Ebpf, EbpfError, Kernel, xdp};

impl Ebpf {
    /// Follows what happened to interfaces and addresses, as far as the kernel lets us.
    pub(super) fn follow_node(&mut self) -> Result<(), EbpfError> {
        let Some(mut kernel) = self.kernel.take() else { return Ok(()) };
        let mut refusals = Refusals::default();
        if let Err(error) = self.try_to_follow(&mut kernel, &mut refusals) {
            refusals.give_up(&error);
        }
        self.kernel = Some(kernel);
        self.troubles.note(refusals, monotonic_ns()?);
        Ok(())
    }

    fn try_to_follow(
        &mut self,
        kernel: &mut Kernel,
        refusals: &mut Refusals,
    ) -> Result<(), EbpfError> {
        let node = self.observe_node()?;
        self.make_room(kernel, Amounts::default())?;
        self.refresh_node(kernel, node, refusals)?;
        self.attach(kernel, refusals).map(drop)
    }

    /// Writes what belongs to the node itself.
    pub(super) fn adopt_node(
        &mut self,
        kernel: &Kernel,
        found: Settings,
        wanted: NodeState,
        refusals: &mut Refusals,
    ) -> Result<usize, EbpfError> {
        self.node = read_node(&kernel.maps, found)?;
        // Addresses of Service ranges are nobody's only when all Services are in force.
        let service_ranges = self.node.service_ranges.clone();
        let wanted = NodeState { service_ranges, ..wanted };
        let mut operations = self.refresh_node(kernel, wanted, refusals)?;
        if found.host_cookie != self.cookie {
            self.write_settings(kernel, found.numbers)?;
            operations += 1;
        }
        Ok(operations)
    }

    /// Writes what belongs to the node itself, but for what the kernel refuses.
    pub(super) fn refresh_node(
        &mut self,
        kernel: &Kernel,
        mut wanted: NodeState,
        refusals: &mut Refusals,
    ) -> Result<usize, EbpfError> {
        let maps = &kernel.maps;
        maps.filter.add_addresses(wanted.addresses.keys())?;
        maps.filter.add_ranges(wanted.service_ranges.keys())?;
        let mut operations = 0;
        macro_rules! replace {
            ($map:ident, $name:expr) => {
                operations +=
                    replace(&maps.$map, &self.node.$map, &mut wanted.$map, $name, refusals)
            };
        }
        replace!(addresses, |address: &Address| IpAddr::from(*address));
        replace!(interfaces, |index| format!("interface {index}"));
        replace!(pod_ranges, of_range);
        replace!(exempt, |cookie| format!("network namespace {cookie}"));
        replace!(service_ranges, of_range);
        let settings = |node: &NodeState| (node.flags, node.address4, node.address6);
        let changed = settings(&self.node) != settings(&wanted);
        self.node = wanted;
        if changed {
            let found = kernel.maps.settings.get(&0)?.unwrap_or_default();
            self.write_settings(kernel, found.numbers)?;
            operations += 1;
        }
        Ok(operations)
    }

    pub(super) fn observe_node(&mut self) -> Result<NodeState, EbpfError> {
        let mut rtnl = Rtnl::open_in(&self.netns)?;
        let (links, addresses) = node::observe(&mut rtnl).map_err(EbpfError::Observe)?;
        let config = &self.config.ebpf;
        // There may be very many.
        let routes = match config.goes_by_routes() {
            true => rtnl.routes().map_err(EbpfError::Observe)?,
            false => Vec::new(),
        };
        self.frames_at = xdp::wanted(config, &links, &routes);
        let obstacles = Obstacles::find(&self.config, &self.netns, &links, &routes)?;
        obstacles.warn(&self.obstacles);
        self.obstacles = obstacles;
        let exempt = self.exempt.read(&self.config.ebpf.exempt);
        self.own_addresses = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        Ok(NodeState::new(&self.config, &links, &addresses, exempt))
    }

    pub(super) fn write_settings(&self, kernel: &Kernel, numbers: u32) -> Result<(), EbpfError> {
        let NodeState { flags, address4, address6, .. } = self.node;
        let host_cookie = self.cookie;
        let found = kernel.maps.settings.get(&0)?.unwrap_or_default();
        let settings = Settings { host_cookie, flags, numbers, address4, address6, ..found };
        kernel.maps.settings.put(&0, &settings)
    }
}

/// What the maps say of the node.
pub(super) fn read_node(maps: &Maps, settings: Settings) -> Result<NodeState, EbpfError> {
    let addresses = maps.addresses.read()?.into_iter();
    Ok(NodeState {
        addresses: addresses.filter(|(_, flags)| flags & ADDRESS_NODE != 0).collect(),
        interfaces: maps.interfaces.read()?.into_iter().collect(),
        pod_ranges: maps.pod_ranges.read()?.into_iter().collect(),
        service_ranges: maps.service_ranges.read()?.into_iter().collect(),
        exempt: maps.exempt.read()?.into_iter().collect(),
        flags: settings.flags,
        address4: settings.address4,
        address6: settings.address6,
    })
}

fn of_range(range: &RangePrefix) -> IpAddr {
    range.key.address.into()
}

/// From one content of a map to another; says how many elements that took. What the kernel refuses is named, and `after`
/// is what there is then.
pub(super) fn replace<K, V, N: Display>(
    table: &Table<K, V>,
    before: &BTreeMap<K, V>,
    after: &mut BTreeMap<K, V>,
    name: impl Fn(&K) -> N,
    refusals: &mut Refusals,
) -> usize
where
    K: aya::Pod + Default + Ord + Hash,
    V: aya::Pod + Default + Eq,
{
    let mut operations = 0;
    let mut refused = Vec::new();
    let changed = after.iter().filter(|(key, value)| before.get(key) != Some(value));
    let (put, left): (Vec<_>, Vec<_>) =
        changed.partition(|(key, value)| table.put(key, value).is_ok());
    operations += put.len();
    for key in before.keys().filter(|key| !after.contains_key(key)) {
        match table.delete(key) {
            Ok(()) => operations += 1,
            Err(error) => refused.push((*key, error)),
        }
    }
    // What did not fit may fit now that others are gone.
    for (key, value) in left {
        match table.put(key, value) {
            Ok(()) => operations += 1,
            Err(error) => refused.push((*key, error)),
        }
    }
    if let Some((key, error)) = refused.first() {
        let what = match refused.len() {
            1 => name(key).to_string(),
            all => format!("{} and {} more", name(key), all - 1),
        };
        refusals.add(table.name(), &what, error);
    }
    for (key, _) in refused {
        match before.get(&key) {
            Some(value) => after.insert(key, *value),
            None => after.remove(&key),
        };
    }
    operations
}
