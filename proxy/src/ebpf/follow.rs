//! Follows the node: its interfaces, addresses and exempt namespaces, and what the programs must know of it.

use std::collections::BTreeMap;
use std::hash::Hash;

use keelson_ebpf_abi::{ADDRESS_NODE, Settings};
use keelson_netlink::route::Rtnl;

use super::maps::Maps;
use super::node::{self, NodeState};
use super::table::Table;
use super::{Ebpf, EbpfError, Kernel};

impl Ebpf {
    /// Follows what happened to interfaces and addresses.
    pub(super) fn follow_node(&mut self) -> Result<(), EbpfError> {
        let Some(mut kernel) = self.kernel.take() else { return Ok(()) };
        let followed = self
            .observe_node()
            .and_then(|node| self.refresh_node(&kernel, node))
            .and_then(|_| self.attach(&mut kernel));
        self.kernel = Some(kernel);
        followed.map(drop)
    }

    /// Writes what belongs to the node itself.
    pub(super) fn adopt_node(
        &mut self,
        kernel: &Kernel,
        found: Settings,
    ) -> Result<usize, EbpfError> {
        self.node = read_node(&kernel.maps, found)?;
        // Addresses of Service ranges are nobody's only when all Services are in force.
        let service_ranges = self.node.service_ranges.clone();
        let wanted = NodeState { service_ranges, ..self.observe_node()? };
        let mut operations = self.refresh_node(kernel, wanted)?;
        if found.host_cookie != self.cookie {
            self.write_settings(kernel, found.numbers)?;
            operations += 1;
        }
        Ok(operations)
    }

    /// Follows changes of interfaces and addresses.
    pub(super) fn refresh_node(
        &mut self,
        kernel: &Kernel,
        wanted: NodeState,
    ) -> Result<usize, EbpfError> {
        let maps = &kernel.maps;
        maps.filter.add_addresses(wanted.addresses.keys())?;
        maps.filter.add_ranges(wanted.service_ranges.keys())?;
        let mut operations = replace(&maps.addresses, &self.node.addresses, &wanted.addresses)?;
        operations += replace(&maps.interfaces, &self.node.interfaces, &wanted.interfaces)?;
        operations += replace(&maps.pod_ranges, &self.node.pod_ranges, &wanted.pod_ranges)?;
        operations += replace(&maps.exempt, &self.node.exempt, &wanted.exempt)?;
        operations +=
            replace(&maps.service_ranges, &self.node.service_ranges, &wanted.service_ranges)?;
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
        let exempt = self.exempt.read(&self.config.ebpf.exempt);
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

/// From one content of a map to another; says how many elements that took.
pub(super) fn replace<K, V>(
    table: &Table<K, V>,
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Result<usize, EbpfError>
where
    K: aya::Pod + Default + Ord + Hash,
    V: aya::Pod + Default + Eq,
{
    let mut operations = 0;
    for (key, value) in after.iter().filter(|(key, value)| before.get(key) != Some(value)) {
        table.put(key, value)?;
        operations += 1;
    }
    for key in before.keys().filter(|key| !after.contains_key(key)) {
        table.delete(key)?;
        operations += 1;
    }
    Ok(operations)
}
