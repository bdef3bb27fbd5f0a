//! Which decisions are shown. Pure.

use keelson_ebpf_abi::{EVENT_DROPPED, EVENT_REFUSED};

use super::MonitorArgs;
use super::decision::Decision;

pub(super) struct Filter<'a> {
    wanted: &'a MonitorArgs,
}

impl<'a> Filter<'a> {
    pub(super) fn new(wanted: &'a MonitorArgs) -> Self {
        Filter { wanted }
    }

    pub(super) fn shows(&self, decision: &Decision) -> bool {
        let wanted = self.wanted;
        let is = |address| decision.ends().any(|(end, _)| end == address);
        (!wanted.drops || matches!(decision.what, EVENT_DROPPED | EVENT_REFUSED))
            && wanted.address.is_none_or(is)
            && wanted.port.is_none_or(|port| decision.ends().any(|(_, end)| end == Some(port)))
            && wanted.protocol.is_none_or(|protocol| decision.protocol == protocol as u8)
            && wanted.service.as_ref().is_none_or(|service| {
                decision.service.as_ref().is_some_and(|name| is_of(name, service))
            })
    }
}

/// Whether a Service port is that one, or of that Service.
fn is_of(name: &str, wanted: &str) -> bool {
    name.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use keelson_ebpf_abi::{EVENT_CONNECTED, Event};

    use super::super::decision::From;
    use super::super::decision::tests::{event, socket_event};
    use super::super::{MonitorArgs, decision};
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        monitor: MonitorArgs,
    }

    fn shows(line: &str, event: &Event, from: From) -> bool {
        let line = Line::parse_from(["monitor"].into_iter().chain(line.split_whitespace()));
        let decision = decision::of(event, Some("ns/web:http".to_owned()), from);
        Filter::new(&line.monitor).shows(&decision)
    }

    #[test]
    fn filters_look_at_both_ends_and_the_endpoint() {
        let connected = event(EVENT_CONNECTED);
        for (line, shown) in [
            ("", true),
            ("--port 8080", true),
            ("--port 30080", true),
            ("--port 4000", true),
            ("--port 80", false),
            ("--address 10.0.0.2", true),
            ("--address 10.0.0.3", false),
            ("--protocol tcp", true),
            ("--protocol UDP", false),
            ("--drops", false),
            ("--service ns/web", true),
            ("--service ns/web:http", true),
            ("--service ns/web:https", false),
            ("--service ns/we", false),
            ("--service ns/web --port 80", false),
        ] {
            assert_eq!(shows(line, &connected, From::address(&connected)), shown, "{line}");
        }
        let refused = event(EVENT_REFUSED);
        assert!(shows("--drops", &refused, From::address(&refused)));
    }

    #[test]
    fn a_socket_has_the_address_of_its_pod_and_no_port() {
        let connected = socket_event(EVENT_CONNECTED);
        let pod = From::Pod([10, 0, 0, 9].into());
        for (line, from, shown) in [
            ("--address 10.0.0.9", pod, true),
            ("--address 10.0.0.9", From::Node, false),
            ("--port 0", pod, false),
            ("--address 10.96.0.1 --port 8080", From::Namespace(7), true),
        ] {
            assert_eq!(shows(line, &connected, from), shown, "{line} {from:?}");
        }
    }
}
