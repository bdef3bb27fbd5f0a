//! The flags about connection tracking.

use std::time::Duration;

use anyhow::Context;
use clap::ArgAction;

use crate::conntrack::ConntrackLimits;

/// As kube-proxy has them: a value of 0 leaves a limit as it is.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub struct ConntrackFlags {
    /// Connections that the kernel remembers per core; in mode ebpf also those that its own programs do
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<u32>,
    /// Connections that it remembers at least
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<u32>,
    /// How long it remembers a silent TCP connection, such as 24h
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_established: Option<String>,
    /// How long one that the server has closed
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_close_wait: Option<String>,
    /// How long a UDP flow without an answer
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout: Option<String>,
    /// How long a UDP flow with answers
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout_stream: Option<String>,
    /// Segments outside the window are not invalid
    #[arg(long, num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    pub conntrack_tcp_be_liberal: Option<bool>,
}

impl ConntrackFlags {
    /// Takes over what is not given.
    pub(super) fn fill_from(&mut self, file: ConntrackFlags) {
        fn fill<T>(flag: &mut Option<T>, file: Option<T>) {
            if flag.is_none() {
                *flag = file;
            }
        }
        fill(&mut self.conntrack_max_per_core, file.conntrack_max_per_core);
        fill(&mut self.conntrack_min, file.conntrack_min);
        let established = file.conntrack_tcp_timeout_established;
        fill(&mut self.conntrack_tcp_timeout_established, established);
        fill(&mut self.conntrack_tcp_timeout_close_wait, file.conntrack_tcp_timeout_close_wait);
        fill(&mut self.conntrack_udp_timeout, file.conntrack_udp_timeout);
        fill(&mut self.conntrack_udp_timeout_stream, file.conntrack_udp_timeout_stream);
        fill(&mut self.conntrack_tcp_be_liberal, file.conntrack_tcp_be_liberal);
    }

    pub(super) fn limits(&self) -> anyhow::Result<ConntrackLimits> {
        let default = ConntrackLimits::default();
        let timeout = |flag: &str, text: &Option<String>, default| match text {
            None => Ok(default),
            Some(text) => duration(text)
                .with_context(|| format!("{flag}: {text:?} is not a duration such as 1h30m")),
        };
        Ok(ConntrackLimits {
            max_per_core: self.conntrack_max_per_core.unwrap_or(default.max_per_core),
            min: self.conntrack_min.unwrap_or(default.min),
            tcp_established: timeout(
                "--conntrack-tcp-timeout-established",
                &self.conntrack_tcp_timeout_established,
                default.tcp_established,
            )?,
            tcp_close_wait: timeout(
                "--conntrack-tcp-timeout-close-wait",
                &self.conntrack_tcp_timeout_close_wait,
                default.tcp_close_wait,
            )?,
            udp: timeout("--conntrack-udp-timeout", &self.conntrack_udp_timeout, default.udp)?,
            udp_stream: timeout(
                "--conntrack-udp-timeout-stream",
                &self.conntrack_udp_timeout_stream,
                default.udp_stream,
            )?,
            tcp_be_liberal: self.conntrack_tcp_be_liberal.unwrap_or(default.tcp_be_liberal),
        })
    }
}

/// As Go writes durations: `24h0m0s`, `90s`, `0`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u32 = rest[..digits].parse().ok()?;
        let after = &rest[digits..];
        let length = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let unit = match &after[..length] {
            "h" => Duration::from_secs(3600),
            "m" => Duration::from_secs(60),
            "s" => Duration::from_secs(1),
            "ms" => Duration::from_millis(1),
            _ => return None,
        };
        total = total.checked_add(unit.checked_mul(number)?)?;
        rest = &after[length..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, want) in [
            ("24h0m0s", Some(86_400)),
            ("1h30m", Some(5400)),
            ("90s", Some(90)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("5", None),
            ("", None),
            ("1d", None),
            ("-1s", None),
        ] {
            assert_eq!(duration(text), want.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn a_wrong_duration_names_the_flag() {
        let flags = ConntrackFlags {
            conntrack_udp_timeout: Some("soon".to_owned()),
            ..ConntrackFlags::default()
        };
        let error = format!("{:#}", flags.limits().unwrap_err());
        assert_eq!(error, "--conntrack-udp-timeout: \"soon\" is not a duration such as 1h30m");
    }
}
