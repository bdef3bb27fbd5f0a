//! The flags about the IPVS mode.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::ArgAction;

use super::conntrack::duration;
use super::parse_cidrs;
use crate::ipvs::{IpvsConfig, SCHEDULERS};

/// As kube-proxy has them.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub struct IpvsFlags {
    /// Who chooses among endpoints in mode ipvs: rr (default), wrr, lc, wlc, sh, mh, sed, nq, ...
    #[arg(long, value_name = "NAME")]
    pub ipvs_scheduler: Option<String>,
    /// Ranges in which mode ipvs does not remove virtual servers that an earlier process left
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub ipvs_exclude_cidrs: Vec<String>,
    /// Mode ipvs: answer ARP only for addresses of the interface that was asked
    #[arg(long, num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    pub ipvs_strict_arp: Option<bool>,
    /// How long IPVS remembers a silent TCP connection, such as 15m; 0 leaves the kernel's value
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcp_timeout: Option<String>,
    /// How long one that one side has closed
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcpfin_timeout: Option<String>,
    /// How long a UDP flow
    #[arg(long, value_name = "DURATION")]
    pub ipvs_udp_timeout: Option<String>,
    /// Changes are put in force at once, whatever this says
    #[arg(long, hide = true)]
    pub ipvs_sync_period: Option<String>,
    /// Likewise
    #[arg(long, hide = true)]
    pub ipvs_min_sync_period: Option<String>,
}

impl IpvsFlags {
    /// Takes over what is not given.
    pub(super) fn fill_from(&mut self, file: IpvsFlags) {
        fn fill<T>(flag: &mut Option<T>, file: Option<T>) {
            if flag.is_none() {
                *flag = file;
            }
        }
        fill(&mut self.ipvs_scheduler, file.ipvs_scheduler);
        fill(&mut self.ipvs_strict_arp, file.ipvs_strict_arp);
        fill(&mut self.ipvs_tcp_timeout, file.ipvs_tcp_timeout);
        fill(&mut self.ipvs_tcpfin_timeout, file.ipvs_tcpfin_timeout);
        fill(&mut self.ipvs_udp_timeout, file.ipvs_udp_timeout);
        if self.ipvs_exclude_cidrs.is_empty() {
            self.ipvs_exclude_cidrs = file.ipvs_exclude_cidrs;
        }
    }

    pub(super) fn config(&self) -> anyhow::Result<IpvsConfig> {
        let default = IpvsConfig::default();
        let scheduler = match self.ipvs_scheduler.as_deref().map(str::trim) {
            None | Some("") => default.scheduler,
            Some(name) if SCHEDULERS.contains(&name) => name.to_owned(),
            Some(name) => {
                let known = SCHEDULERS.join(", ");
                bail!("--ipvs-scheduler: {name:?} is not a scheduler of IPVS; use one of {known}")
            }
        };
        Ok(IpvsConfig {
            scheduler,
            excluded: parse_cidrs("--ipvs-exclude-cidrs", &self.ipvs_exclude_cidrs)?,
            strict_arp: self.ipvs_strict_arp.unwrap_or(default.strict_arp),
            tcp_timeout: seconds("--ipvs-tcp-timeout", self.ipvs_tcp_timeout.as_deref())?,
            tcp_fin_timeout: seconds("--ipvs-tcpfin-timeout", self.ipvs_tcpfin_timeout.as_deref())?,
            udp_timeout: seconds("--ipvs-udp-timeout", self.ipvs_udp_timeout.as_deref())?,
        })
    }
}

/// The kernel counts whole seconds, and refuses more than fit its clock (`ip_vs_set_timeout`).
fn seconds(flag: &str, text: Option<&str>) -> anyhow::Result<u32> {
    const MOST: u64 = (i32::MAX / 1000) as u64;
    let Some(text) = text else { return Ok(0) };
    let length = duration(text)
        .with_context(|| format!("{flag}: {text:?} is not a duration such as 15m"))?;
    let whole = length.as_secs() + u64::from(length.subsec_nanos() > 0);
    u32::try_from(whole)
        .ok()
        .filter(|_| whole <= MOST)
        .with_context(|| format!("{flag}: {text:?} is longer than {:?}", Duration::from_secs(MOST)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedulers_and_timeouts_are_those_of_the_kernel() {
        let flags = IpvsFlags {
            ipvs_scheduler: Some("mh".to_owned()),
            ipvs_tcp_timeout: Some("15m".to_owned()),
            ipvs_udp_timeout: Some("1500ms".to_owned()),
            ipvs_exclude_cidrs: vec!["192.0.2.0/24".to_owned()],
            ..IpvsFlags::default()
        };
        let config = flags.config().unwrap();
        assert_eq!(config.scheduler, "mh");
        assert_eq!((config.tcp_timeout, config.tcp_fin_timeout, config.udp_timeout), (900, 0, 2));
        assert_eq!(config.excluded, ["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(IpvsFlags::default().config().unwrap(), IpvsConfig::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |flags: IpvsFlags| format!("{:#}", flags.config().unwrap_err());
        let scheduler = Some("random".to_owned());
        let text = error(IpvsFlags { ipvs_scheduler: scheduler, ..IpvsFlags::default() });
        assert!(text.starts_with("--ipvs-scheduler: \"random\" is not a scheduler"), "{text}");
        let timeout = Some("9999h".to_owned());
        let text = error(IpvsFlags { ipvs_tcpfin_timeout: timeout, ..IpvsFlags::default() });
        assert!(text.starts_with("--ipvs-tcpfin-timeout: \"9999h\" is longer than"), "{text}");
    }
}
