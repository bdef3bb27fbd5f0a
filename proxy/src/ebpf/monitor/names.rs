//! Names of Services, as the running proxy knows them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use keelson_ebpf_abi::Event;
use serde::Deserialize;

use crate::server;

/// Services that came meanwhile are asked for at most that often.
const AGAIN: Duration = Duration::from_secs(1);

/// What `/services` says.
#[derive(Debug, Default, Deserialize)]
struct Answer {
    ports: HashMap<u32, String>,
    addresses: HashMap<IpAddr, String>,
}

pub(super) struct Known {
    proxy: Option<SocketAddr>,
    answer: Option<Answer>,
    asked: Instant,
}

impl Known {
    pub(super) fn ask(proxy: Option<SocketAddr>) -> Self {
        let mut known = Known { proxy, answer: None, asked: Instant::now() };
        known.ask_again();
        known
    }

    fn ask_again(&mut self) {
        let text = self.proxy.and_then(|proxy| server::ask(proxy, "/services"));
        // Also an older proxy's "not found" is no answer.
        let answer = text.and_then(|text| serde_json::from_str(&text).ok());
        self.answer = answer.or(self.answer.take());
        self.asked = Instant::now();
    }

    pub(super) fn answers(&self) -> bool {
        self.answer.is_some()
    }

    /// The Service port that an event is about, or only the Service where no port of it was asked for.
    pub(super) fn name(&mut self, event: &Event, now: Instant) -> Option<String> {
        if event.frontend == 0 {
            let asked = IpAddr::from(event.tuple.destination);
            return self.answer.as_ref()?.addresses.get(&asked).cloned();
        }
        let is_known = |known: &Self| {
            known.answer.as_ref().is_some_and(|answer| answer.ports.contains_key(&event.frontend))
        };
        if !is_known(self) && now.saturating_duration_since(self.asked) >= AGAIN {
            self.ask_again();
        }
        self.answer.as_ref()?.ports.get(&event.frontend).cloned()
    }
}
