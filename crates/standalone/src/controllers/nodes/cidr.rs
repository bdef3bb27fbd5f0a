//! Which pod addresses a node gets: the first free part of each of the cluster's ranges.

use std::net::IpAddr;
use std::str::FromStr;

use k8s_openapi::api::core::v1::Node;
use serde_json::json;
use tokio::sync::Mutex;

use crate::controllers::cluster::{Change, Key};
use crate::controllers::queue::Outcome;
use crate::controllers::recorder::{Recorder, Tone};
use crate::controllers::worker::Controller;
use crate::{Api, ApiError, PatchType, Registry};

/// An address range, as numbers that are as wide as the family is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    first: u128,
    prefix: u32,
    width: u32,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an address range such as 10.244.0.0/16");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let prefix: u32 = prefix.parse().map_err(|_| wrong())?;
        let (bits, width) = match address.parse::<IpAddr>().map_err(|_| wrong())? {
            IpAddr::V4(address) => (u128::from(u32::from(address)), 32),
            IpAddr::V6(address) => (u128::from(address), 128),
        };
        if prefix > width {
            return Err(wrong());
        }
        Ok(Self { first: bits & !Self::host_mask(width, prefix), prefix, width })
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = if self.width == 32 {
            IpAddr::from(u32::try_from(self.first).unwrap_or(u32::MAX).to_be_bytes())
        } else {
            IpAddr::from(self.first.to_be_bytes())
        };
        write!(f, "{address}/{}", self.prefix)
    }
}

impl Range {
    fn host_mask(width: u32, prefix: u32) -> u128 {
        1_u128.checked_shl(width - prefix).map_or(u128::MAX, |size| size - 1)
    }

    fn last(self) -> u128 {
        self.first | Self::host_mask(self.width, self.prefix)
    }

    fn overlaps(self, other: Self) -> bool {
        self.width == other.width && self.first <= other.last() && other.first <= self.last()
    }

    /// The size of a node's part, as upstream has it by default: /24 and /64, or the whole of a smaller range.
    fn part_prefix(self) -> u32 {
        let usual = if self.width == 32 { 24 } else { 64 };
        usual.max(self.prefix)
    }

    /// The first part that overlaps nothing in `used`.
    pub(crate) fn first_free(self, used: &[Self]) -> Option<Self> {
        let prefix = self.part_prefix();
        let mut part = Self { first: self.first, prefix, width: self.width };
        loop {
            let Some(taken) = used.iter().find(|used| part.overlaps(**used)) else {
                return Some(part);
            };
            // Go on behind what is in the way, at the next border of parts.
            let next = taken.last().max(part.last()).checked_add(1)?;
            let mask = Self::host_mask(self.width, prefix);
            part.first = next.checked_add(mask)? & !mask;
            if part.first > self.last() {
                return None;
            }
        }
    }
}

/// Assigns `spec.podCIDRs` to nodes. Keys are nodes.
pub(crate) struct NodeCidrs {
    nodes: Api<Node>,
    recorder: Recorder,
    ranges: Vec<Range>,
    /// One assignment at a time: two nodes must not get the same part.
    assigning: Mutex<()>,
}

impl NodeCidrs {
    pub(crate) fn new(
        registry: &Registry,
        recorder: Recorder,
        ranges: Vec<Range>,
    ) -> Result<Self, ApiError> {
        Ok(Self { nodes: registry.api()?, recorder, ranges, assigning: Mutex::new(()) })
    }
}

fn assigned(node: &Node) -> Vec<Range> {
    let spec = node.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let single = spec.and_then(|spec| spec.pod_cidr.clone());
    listed.iter().chain(&single).filter_map(|text| text.parse().ok()).collect()
}

impl Controller for NodeCidrs {
    const NAME: &'static str = "node-cidr";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        if let Change::Node(delta) = change
            && let Some(node) = delta.new.as_ref().filter(|node| assigned(node).is_empty())
            && !self.ranges.is_empty()
        {
            add(Key::of(&node.metadata));
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let _one_at_a_time = self.assigning.lock().await;
        let Ok(node) = self.nodes.get("", &key.name) else { return Ok(Outcome::Done) };
        if !assigned(&node).is_empty() {
            return Ok(Outcome::Done);
        }
        let (nodes, _) = self.nodes.list("")?;
        let used: Vec<Range> = nodes.iter().flat_map(assigned).collect();
        let free: Option<Vec<String>> = self
            .ranges
            .iter()
            .map(|range| range.first_free(&used).map(|part| part.to_string()))
            .collect();
        let Some(free) = free else {
            let text = format!("Node {} status is now: CIDRNotAvailable", key.name);
            self.recorder.record::<Node>(&node.metadata, Tone::Normal, "CIDRNotAvailable", &text);
            let text = format!(
                "no pod address range is left for node {}: delete nodes that are gone, or use a larger cluster range",
                key.name
            );
            return Err(ApiError::internal(text));
        };
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"podCIDR": free.first(), "podCIDRs": free},
        });
        self.nodes.patch("", &key.name, PatchType::Merge, &patch).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_part_is_taken() {
        let range = |text: &str| text.parse::<Range>().unwrap();
        let check = |cluster: &str, used: &[&str], want: Option<&str>| {
            let used: Vec<Range> = used.iter().map(|text| range(text)).collect();
            let found = range(cluster).first_free(&used).map(|part| part.to_string());
            assert_eq!(found.as_deref(), want, "{cluster} {used:?}");
        };
        check("10.244.0.0/16", &[], Some("10.244.0.0/24"));
        check("10.244.0.0/16", &["10.244.0.0/24", "10.244.2.0/24"], Some("10.244.1.0/24"));
        check("10.244.0.0/16", &["10.244.0.0/22"], Some("10.244.4.0/24"));
        check("10.244.0.0/16", &["fd00::/64"], Some("10.244.0.0/24"));
        check("10.244.0.0/24", &["10.244.0.0/24"], None);
        check("10.244.0.0/26", &[], Some("10.244.0.0/26"));
        check("255.255.255.0/24", &["255.255.255.0/25"], None);
        check("fd00:1::/48", &["fd00:1::/64"], Some("fd00:1:0:1::/64"));
        assert!("10.0.0.0/33".parse::<Range>().is_err());
        assert!("pods".parse::<Range>().is_err());
    }
}
