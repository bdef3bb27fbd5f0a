//! What `iptables-save` tells about our chains, or about kube-proxy's. Pure.

use std::collections::HashMap;

use super::names::{PREFIX, Table};

/// Somebody's part of one family's rules, as text: ours, mostly.
#[derive(Debug, Default)]
pub(crate) struct Saved<'t> {
    /// The owner's chains and their rules.
    pub(crate) chains: HashMap<(Table, &'t str), Vec<&'t str>>,
    /// Rules of others' chains that lead to the owner's: table, chain, rule.
    pub(crate) jumps: Vec<(Table, &'t str, &'t str)>,
}

impl<'t> Saved<'t> {
    /// Reads our part of the output of `iptables-save`.
    pub(crate) fn parse(text: &'t str) -> Saved<'t> {
        Saved::parse_of(text, |chain| chain.starts_with(PREFIX))
    }

    /// Reads the part of the output that belongs to whoever owns the chains with such names.
    pub(crate) fn parse_of(text: &'t str, owns: impl Fn(&str) -> bool) -> Saved<'t> {
        let mut saved = Saved::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::parse(name);
            }
            let Some(table) = table else { continue };
            if let Some(declared) = line.strip_prefix(':') {
                let name = declared.split(' ').next().unwrap_or_default();
                if owns(name) {
                    saved.chains.entry((table, name)).or_default();
                }
            } else if let Some((chain, rule)) =
                line.strip_prefix("-A ").and_then(|rule| rule.split_once(' '))
            {
                saved.add(table, chain, rule, &owns);
            }
        }
        saved
    }

    fn add(&mut self, table: Table, chain: &'t str, rule: &'t str, owns: impl Fn(&str) -> bool) {
        if owns(chain) {
            self.chains.entry((table, chain)).or_default().push(rule);
        } else if target(rule).is_some_and(owns) {
            self.jumps.push((table, chain, rule));
        }
    }
}

/// The chain or extension that a rule leads to.
pub(crate) fn target(rule: &str) -> Option<&str> {
    let mut words = rule.split(' ');
    words.find(|word| matches!(*word, "-j" | "-g"))?;
    words.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_is_read() {
        let text = "# Generated\n*raw\n:KEELSON-X - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [1:2]\n\
            :CNI-HOSTPORT - [0:0]\n:KEELSON-SERVICES - [0:0]\n:KEELSON-MARK - [0:0]\n\
            -A PREROUTING -j KEELSON-SERVICES\n-A PREROUTING -j CNI-HOSTPORT\n\
            -A KEELSON-MARK -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n";
        let saved = Saved::parse(text);
        assert_eq!(saved.jumps, [(Table::Nat, "PREROUTING", "-j KEELSON-SERVICES")]);
        assert_eq!(saved.chains.len(), 2);
        assert_eq!(
            saved.chains[&(Table::Nat, "KEELSON-MARK")],
            ["-j MARK --set-xmark 0x4000/0x4000"]
        );
        assert!(saved.chains[&(Table::Nat, "KEELSON-SERVICES")].is_empty());
    }
}
