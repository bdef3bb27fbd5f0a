//! Network configuration lists: reading a configuration folder the way runtimes do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use crate::version::Version;

/// Why a configuration cannot be used. The text names file and field.
#[derive(Debug, thiserror::Error)]
pub enum ConflistError {
    /// The folder or a file cannot be read.
    #[error("cannot read CNI configuration {path}")]
    Unreadable {
        /// Folder or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No usable file: `problems` says what is wrong with those that are there.
    #[error("no usable CNI configuration in {folder}{}", listed(.problems))]
    None {
        /// The folder.
        folder: PathBuf,
        /// One line per unusable file.
        problems: Vec<String>,
    },
    /// A file or text with a wrong field.
    #[error("{origin}: {problem}")]
    Invalid {
        /// The file.
        origin: PathBuf,
        /// The field and what is wrong with it.
        problem: String,
    },
}

fn listed(problems: &[String]) -> String {
    if problems.is_empty() {
        return " (it holds no .conflist, .conf or .json file)".to_owned();
    }
    format!(": {}", problems.join("; "))
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginConf {
    /// The binary's name.
    pub kind: String,
    /// The capabilities that it declares as wanted.
    pub capabilities: Vec<String>,
    /// Its whole configuration.
    pub fields: Map<String, Value>,
}

/// A network configuration list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflist {
    /// Where it came from.
    pub origin: PathBuf,
    /// The network's name.
    pub name: String,
    /// The version that plugins are called with.
    pub version: Version,
    /// CHECK is not wanted.
    pub disable_check: bool,
    /// GC is not wanted.
    pub disable_gc: bool,
    /// The chain; never empty.
    pub plugins: Vec<PluginConf>,
    /// The list as it was written.
    pub source: Value,
}

impl Conflist {
    /// The first usable configuration of `folder` in lexical order of the file names, as containerd and CRI-O choose.
    ///
    /// # Errors
    /// When the folder cannot be read, or no file in it is usable.
    pub fn load_dir(folder: &Path) -> Result<Self, ConflistError> {
        let mut problems = Vec::new();
        for file in candidates(folder)? {
            match Self::load_file(&file) {
                Ok(list) => return Ok(list),
                Err(error) => problems.push(crate::error::chain(&error)),
            }
        }
        Err(ConflistError::None { folder: folder.to_owned(), problems })
    }

    /// One file: a list, or a single plugin's configuration (which only versions below 1.0 know).
    ///
    /// # Errors
    /// When it cannot be read or a field is wrong.
    pub fn load_file(file: &Path) -> Result<Self, ConflistError> {
        let text = fs::read(file)
            .map_err(|source| ConflistError::Unreadable { path: file.to_owned(), source })?;
        Self::parse(file, &text)
    }

    /// Reads a list from its text; `origin` is named in errors.
    ///
    /// # Errors
    /// When a field is missing or wrong.
    pub fn parse(origin: &Path, text: &[u8]) -> Result<Self, ConflistError> {
        let fail = |problem| ConflistError::Invalid { origin: origin.to_owned(), problem };
        let value: Value =
            serde_json::from_slice(text).map_err(|e| fail(format!("not JSON: {e}")))?;
        Self::from_value(origin, value).map_err(fail)
    }

    fn from_value(origin: &Path, source: Value) -> Result<Self, String> {
        let fields = source.as_object().ok_or("not a JSON object")?;
        let name = text_field(fields, "name")?;
        if !crate::protocol::is_name(&name) {
            return Err(format!(
                "name: {name:?} must start with a letter or digit and hold only those and _ . -"
            ));
        }
        let version = version(fields)?;
        let plugins = match fields.get("plugins") {
            Some(Value::Array(plugins)) if !plugins.is_empty() => plugins
                .iter()
                .enumerate()
                .map(|(i, plugin)| {
                    plugin_conf(plugin).map_err(|problem| format!("plugins[{i}]{problem}"))
                })
                .collect::<Result<_, _>>()?,
            Some(_) => return Err("plugins: must be a list with at least one entry".to_owned()),
            None if fields.contains_key("type") => {
                vec![plugin_conf(&source).map_err(|p| p.trim_start_matches('.').to_owned())?]
            }
            None => return Err("plugins: missing".to_owned()),
        };
        Ok(Self {
            origin: origin.to_owned(),
            name,
            version,
            disable_check: flag(fields, "disableCheck")?,
            disable_gc: flag(fields, "disableGC")?,
            plugins,
            source,
        })
    }
}

/// The text of keelson's own configuration list for a node with these pod networks.
#[must_use]
pub fn default_conflist(pod_cidrs: &[IpNetwork]) -> String {
    let list = json!({
        "cniVersion": Version::NEWEST.as_str(),
        "name": "keelson",
        "plugins": [{
            "type": "keelson-cni",
            "podCIDRs": pod_cidrs,
            "capabilities": { "portMappings": true },
        }],
    });
    format!("{list:#}\n")
}

fn candidates(folder: &Path) -> Result<Vec<PathBuf>, ConflistError> {
    let fail = |source| ConflistError::Unreadable { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let wanted = path
            .extension()
            .is_some_and(|extension| ["conflist", "conf", "json"].iter().any(|e| extension == *e));
        if wanted && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn version(fields: &Map<String, Value>) -> Result<Version, String> {
    let unknown = |text: &str| {
        format!("cniVersion: {text:?} is not supported (supported: {})", Version::list())
    };
    // `cniVersions` (1.1.0) offers several: the newest that we speak is taken.
    if let Some(offered) = fields.get("cniVersions") {
        let offered = offered.as_array().ok_or("cniVersions: must be a list of texts")?;
        let best = offered.iter().filter_map(Value::as_str).filter_map(Version::parse).max();
        if let Some(best) = best {
            return Ok(best);
        }
    }
    match fields.get("cniVersion") {
        None => Err(unknown("")),
        Some(Value::String(text)) => Version::parse(text).ok_or_else(|| unknown(text)),
        Some(_) => Err("cniVersion: must be a text".to_owned()),
    }
}

fn plugin_conf(plugin: &Value) -> Result<PluginConf, String> {
    let fields = plugin.as_object().ok_or(": must be an object")?;
    let kind = text_field(fields, "type").map_err(|problem| format!(".{problem}"))?;
    if kind.is_empty() || kind.contains('/') {
        return Err(format!(".type: {kind:?} is not the name of a plugin binary"));
    }
    let capabilities = match fields.get("capabilities") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(wanted)) => wanted
            .iter()
            .filter(|(_, on)| on.as_bool().unwrap_or(false))
            .map(|(name, _)| name.clone())
            .collect(),
        Some(_) => return Err(".capabilities: must be an object of true and false".to_owned()),
    };
    Ok(PluginConf { kind, capabilities, fields: fields.clone() })
}

fn text_field(fields: &Map<String, Value>, name: &str) -> Result<String, String> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("{name}: must be a text")),
        None => Err(format!("{name}: missing")),
    }
}

fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        // CNI 0.4.0 wrote "disableCheck" as a text in places; libcni takes both.
        Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
        Some(_) => Err(format!("{name}: must be true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Conflist, String> {
        Conflist::parse(Path::new("10-x.conflist"), text.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn wrong_fields_are_named() {
        let cases = [
            ("{", "10-x.conflist: not JSON"),
            ("[]", "10-x.conflist: not a JSON object"),
            (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "name: missing"),
            (r#"{"cniVersion":"1.0.0","name":"a b","plugins":[]}"#, r#"name: "a b" must start"#),
            (r#"{"cniVersion":"1.0.0","name":"a"}"#, "plugins: missing"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#, "plugins: must be a list"),
            (
                r#"{"cniVersion":"9.0.0","name":"a","plugins":[{"type":"b"}]}"#,
                "cniVersion: \"9.0.0\"",
            ),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{}]}"#, "plugins[0].type: missing"),
            (
                r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../sh"}]}"#,
                "plugins[0].type: \"../sh\"",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"a","disableCheck":7,"plugins":[{"type":"b"}]}"#,
                "disableCheck: must be",
            ),
        ];
        for (text, want) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(want), "{text}\n gave {error}\n not {want}");
        }
    }

    #[test]
    fn the_first_usable_file_in_lexical_order_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let conf = |name: &str| {
            format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"b"}}]}}"#)
        };
        fs::write(dir.path().join("30-c.conflist"), conf("c")).unwrap();
        fs::write(dir.path().join("20-b.conflist"), conf("b")).unwrap();
        fs::write(dir.path().join("10-a.conflist"), "{").unwrap();
        fs::write(dir.path().join("05-notes.txt"), conf("notes")).unwrap();
        assert_eq!(Conflist::load_dir(dir.path()).unwrap().name, "b");
        fs::remove_file(dir.path().join("20-b.conflist")).unwrap();
        fs::remove_file(dir.path().join("30-c.conflist")).unwrap();
        let error = Conflist::load_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("10-a.conflist: not JSON"), "{error}");
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        let list = parse(
            r#"{"cniVersion":"0.4.0","cniVersions":["0.4.0","1.0.0","7.0.0"],"name":"a","plugins":[{"type":"b"}]}"#,
        );
        assert_eq!(list.unwrap().version, Version::V1_0_0);
    }

    #[test]
    fn our_own_list_is_usable() {
        let text =
            default_conflist(&["10.244.0.0/24".parse().unwrap(), "fd44::/64".parse().unwrap()]);
        let list = parse(&text).unwrap();
        assert_eq!(list.plugins[0].kind, "keelson-cni");
        assert_eq!(list.plugins[0].capabilities, ["portMappings"]);
    }
}
