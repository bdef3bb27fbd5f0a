//! Who is measured, and the programs that they need around them.

pub(crate) mod kubelet;
pub(crate) mod node;

use std::path::Path;
use std::process::Command;

/// What `PROGRAM --version` prints, shortened to a name for a column: `Kubernetes v1.36.2` of a kubelet becomes
/// `kubelet v1.36.2`.
pub(crate) fn version_label(kind: &str, program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    match text.split_whitespace().last() {
        Some(version) => format!("{kind} {version}"),
        None => kind.to_owned(),
    }
}
