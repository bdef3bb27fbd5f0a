//! Which kernel modules to load, and in which order.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The files of `wanted` (names without `.ko`) and of what they need, each after what it needs, by the text of modules.dep.
/// A name that the kernel has no module for is built in, or not there at all: what needs it will say so.
pub(crate) fn in_order(modules_dep: &str, wanted: &[&str]) -> Vec<String> {
    let files: BTreeMap<&str, (&str, Vec<&str>)> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name(file), (file, needs.split_whitespace().collect())))
        .collect();
    let mut order: Vec<String> = Vec::new();
    for module in wanted {
        let Some((file, needs)) = files.get(module) else { continue };
        // modules.dep names all that is needed, also indirectly, what is needed first last.
        for next in needs.iter().rev().chain([file]) {
            if !order.iter().any(|known| known == next) {
                order.push((*next).to_owned());
            }
        }
    }
    order
}

/// A module as the kernel takes it: newer releases of Debian compress them.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(file).output().context("cannot run xz")?;
    if !output.status.success() {
        bail!("cannot unpack {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn name(file: &str) -> &str {
    let last = file.rsplit('/').next().unwrap_or(file);
    last.split(".ko").next().unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn a_module_comes_after_what_it_needs_and_once() {
        let dep = "k/nf_nat.ko: k/nf_conntrack.ko k/defrag.ko\nk/nf_conntrack.ko: k/defrag.ko\nk/defrag.ko:\n";
        let order = in_order(dep, &["nf_nat", "nf_conntrack", "built_in"]);
        assert_eq!(order, ["k/defrag.ko", "k/nf_conntrack.ko", "k/nf_nat.ko"]);
    }
}
