//! What `fuzz/` calls: every reader of foreign bytes in this crate. Each takes any bytes and panics when an invariant does
//! not hold. No program of keelson calls them, so they are in none.

use std::path::Path;

use serde_json::Value;

use crate::conflist::Conflist;
use crate::journal::Contents;
use crate::{config, invoke, journal};

/// What a runtime gives to the plugin on its standard input.
pub fn netconf(input: &[u8]) {
    let Ok(Value::Object(fields)) = serde_json::from_slice(input) else { return };
    drop(config::network(&fields));
    drop(config::valid_attachments(&fields));
    if let Ok(config) = config::config(&fields) {
        assert!(!config.pod_cidrs.is_empty());
    }
}

/// A list of plugins.
pub fn conflist(input: &[u8]) {
    if let Ok(list) = Conflist::parse(Path::new("/etc/cni/net.d/10-x.conflist"), input) {
        assert!(!list.plugins.is_empty() && !list.plugins.iter().any(|p| p.kind.contains('/')));
    }
}

/// What a plugin answers, which may be anybody's.
pub fn plugin_result(input: &[u8]) {
    let text = br#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"b"}]}"#;
    let Ok(list) = Conflist::parse(Path::new("a.conflist"), text) else { return };
    let Ok(raw) = serde_json::from_slice(input) else { return };
    if let Ok(result) = invoke::parse_result(&list, &raw) {
        assert!(result.container_ips().len() <= result.ips.len());
        drop(result.to_json(list.version));
    }
}

/// The journal after a bad day.
pub fn journal(input: &[u8]) {
    let Contents { ledger, end, .. } = journal::read(input);
    assert!(usize::try_from(end).is_ok_and(|end| end <= input.len()));
    // What it says in short is the same.
    let Ok(short) = journal::lines(&ledger.entries()) else {
        panic!("own entries cannot be written")
    };
    let again = journal::read(&short);
    assert_eq!((again.ledger.entries(), again.damaged), (ledger.entries(), 0));
}
