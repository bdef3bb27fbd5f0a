//! Whether the node has a usable network configuration, and the default one for nodes without.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use serde_json::Value;

use crate::config::RuntimeConfig;

/// The name of the list that keelson writes. Whoever wants another network edits it or puts a list
/// of a name that sorts before it beside it.
pub const DEFAULT_NAME: &str = "10-keelson.conflist";

/// Says whether pods can get a network here: the first list of the folder can be read, and the
/// plugins that it names are installed.
///
/// # Errors
/// What is wrong, in a sentence that names the folder, file or plugin.
pub fn check(runtime: &RuntimeConfig) -> Result<(), String> {
    let dir = &runtime.cni_conf_dir;
    let files = lists(dir).map_err(|error| format!("cannot read {}: {error}", dir.display()))?;
    let Some(first) = files.first() else {
        return Err(format!("cni plugin not initialized: no network config in {}", dir.display()));
    };
    let text = std::fs::read_to_string(first)
        .map_err(|error| format!("cannot read {}: {error}", first.display()))?;
    let types = plugin_types(&text).map_err(|error| format!("{}: {error}", first.display()))?;
    for plugin in types {
        if !runtime.cni_bin_dirs.iter().any(|dir| dir.join(&plugin).is_file()) {
            let dirs: Vec<_> =
                runtime.cni_bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
            return Err(format!(
                "{} names the plugin {plugin:?}, which is in none of {}",
                first.display(),
                dirs.join(", ")
            ));
        }
    }
    Ok(())
}

/// Writes the default list for `pod_cidrs` when the folder has no list at all; returns its path. A
/// list that is there is left alone even when it is keelson's own: it may have been edited, and
/// pods have addresses from it.
///
/// # Errors
/// When a CIDR is none or the file cannot be written.
pub fn ensure_default(dir: &Path, pod_cidrs: &[String]) -> anyhow::Result<Option<PathBuf>> {
    use anyhow::Context;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    if !lists(dir)?.is_empty() {
        return Ok(None);
    }
    let own = dir.join(DEFAULT_NAME);
    let cidrs: Vec<IpNetwork> = pod_cidrs
        .iter()
        .map(|cidr| cidr.parse().with_context(|| format!("node.spec.podCIDRs: {cidr:?}")))
        .collect::<Result<_, _>>()?;
    let text = keelson_cni::default_conflist(&cidrs);
    keelson_durable::write(&own, text.as_bytes(), 0o644)?;
    Ok(Some(own))
}

/// The network configurations of a folder in the order in which CNI looks at them.
fn lists(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let known = ["conf", "conflist", "json"].map(OsStr::new);
        if path.extension().is_some_and(|extension| known.contains(&extension)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The plugins that a configuration, or a list of them, calls.
pub(crate) fn plugin_types(text: &str) -> Result<Vec<String>, String> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    let plugin_type = |plugin: &Value| {
        let name = plugin.get("type").and_then(Value::as_str);
        name.map(str::to_owned).ok_or_else(|| "a plugin has no \"type\"".to_owned())
    };
    match value.get("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => {
            plugins.iter().map(plugin_type).collect()
        }
        Some(_) => Err("\"plugins\" is not a list with a plugin in it".to_owned()),
        None => plugin_type(&value).map(|plugin| vec![plugin]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime(dir: &Path) -> RuntimeConfig {
        RuntimeConfig {
            cni_conf_dir: dir.to_owned(),
            cni_bin_dirs: vec![dir.to_owned()],
            ..RuntimeConfig::default()
        }
    }

    #[test]
    fn the_network_is_ready_when_list_and_plugin_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime(dir.path());
        assert!(check(&runtime).unwrap_err().contains("no network config in"));
        let list = dir.path().join("10-a.conflist");
        std::fs::write(&list, "{").unwrap();
        assert!(check(&runtime).unwrap_err().contains("10-a.conflist: is not JSON"));
        std::fs::write(&list, r#"{"plugins": []}"#).unwrap();
        assert!(check(&runtime).unwrap_err().contains("not a list with a plugin"));
        std::fs::write(&list, r#"{"plugins": [{"type": "bridge"}]}"#).unwrap();
        assert!(check(&runtime).unwrap_err().contains("names the plugin \"bridge\""));
        std::fs::write(dir.path().join("bridge"), "").unwrap();
        assert_eq!(check(&runtime), Ok(()));
    }

    #[test]
    fn the_default_list_yields_to_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let cidrs = ["10.244.0.0/24".to_owned()];
        let written = ensure_default(dir.path(), &cidrs).unwrap();
        assert_eq!(written.unwrap(), dir.path().join(DEFAULT_NAME));
        assert_eq!(ensure_default(dir.path(), &cidrs).unwrap(), None);
        std::fs::write(dir.path().join("05-mine.conf"), "{}").unwrap();
        std::fs::remove_file(dir.path().join(DEFAULT_NAME)).unwrap();
        assert_eq!(ensure_default(dir.path(), &cidrs).unwrap(), None);
        let error = ensure_default(&dir.path().join("new"), &["x".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("podCIDRs: \"x\""), "{error}");
    }
}
