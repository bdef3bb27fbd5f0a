//! How many connections the kernel remembers, and for how long: kube-proxy sets this for the whole node,
//! and nodes rely on it.

use std::time::Duration;

use keelson_netlink::sysctl;

/// No more than this, however many cores there are: each entry costs memory.
const MOST: u32 = 1 << 20;

/// Zero leaves a limit as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConntrackLimits {
    /// Connections per core, but at least `min`.
    pub max_per_core: u32,
    pub min: u32,
    pub tcp_established: Duration,
    pub tcp_close_wait: Duration,
    pub udp: Duration,
    pub udp_stream: Duration,
    /// Do not call segments outside the window invalid.
    pub tcp_be_liberal: bool,
}

impl Default for ConntrackLimits {
    /// kube-proxy's.
    fn default() -> Self {
        const HOUR: Duration = Duration::from_secs(3600);
        ConntrackLimits {
            max_per_core: 32_768,
            min: 131_072,
            tcp_established: 24 * HOUR,
            tcp_close_wait: HOUR,
            udp: Duration::ZERO,
            udp_stream: Duration::ZERO,
            tcp_be_liberal: false,
        }
    }
}

impl ConntrackLimits {
    /// How many connections a node with so many cores remembers; nothing when that is left alone.
    #[must_use]
    pub fn most(&self, cores: u32) -> Option<u32> {
        let most = self.max_per_core.saturating_mul(cores).max(self.min).min(MOST);
        (self.max_per_core > 0).then_some(most)
    }

    /// As [`ConntrackLimits::most`], of this machine.
    #[must_use]
    pub fn most_here(&self) -> Option<u32> {
        self.most(cores())
    }

    /// Kernel settings and the values that they shall have.
    fn settings(&self, cores: u32) -> Vec<(&'static str, u64)> {
        [
            ("net/netfilter/nf_conntrack_max", self.most(cores).unwrap_or(0).into()),
            ("net/netfilter/nf_conntrack_tcp_timeout_established", self.tcp_established.as_secs()),
            ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait.as_secs()),
            ("net/netfilter/nf_conntrack_udp_timeout", self.udp.as_secs()),
            ("net/netfilter/nf_conntrack_udp_timeout_stream", self.udp_stream.as_secs()),
            ("net/netfilter/nf_conntrack_tcp_be_liberal", self.tcp_be_liberal.into()),
        ]
        .into_iter()
        .filter(|(_, value)| *value > 0)
        .collect()
    }

    /// Sets the limits of the calling thread's network namespace. What cannot be set is named: Services
    /// work without.
    pub fn apply(&self) {
        for (key, value) in self.settings(cores()) {
            match sysctl::ensure(key, &value.to_string()) {
                Ok(true) => tracing::info!(key, value, "Set a limit of connection tracking"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(key, value, %error, "Cannot set a limit of connection tracking");
                }
            }
        }
    }
}

fn cores() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limits: &ConntrackLimits, cores: u32, name: &str) -> Option<u64> {
        let settings = limits.settings(cores);
        settings.iter().find(|(key, _)| key.ends_with(name)).map(|(_, value)| *value)
    }

    #[test]
    fn the_maximum_follows_the_cores_between_two_bounds() {
        let limits = ConntrackLimits::default();
        assert_eq!(of(&limits, 2, "conntrack_max"), Some(131_072));
        assert_eq!(of(&limits, 8, "conntrack_max"), Some(262_144));
        assert_eq!(of(&limits, 1000, "conntrack_max"), Some(1_048_576));
        let none = ConntrackLimits { max_per_core: 0, ..limits };
        assert_eq!(of(&none, 8, "conntrack_max"), None);
    }

    #[test]
    fn a_limit_of_zero_is_left_alone() {
        let limits = ConntrackLimits::default();
        assert_eq!(of(&limits, 2, "timeout_established"), Some(86_400));
        assert_eq!(of(&limits, 2, "udp_timeout"), None);
        assert_eq!(of(&limits, 2, "be_liberal"), None);
    }
}
