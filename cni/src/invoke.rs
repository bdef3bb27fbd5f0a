//! The runtime's side of CNI: running a list's plugins for one attachment.
//!
//! Everything blocks until the plugins have answered or the time is up; an async caller uses a blocking thread. What DEL
//! needs (configuration, arguments, result) is kept per attachment in the state folder, so that a list that was changed
//! or removed meanwhile does not matter. That folder need not survive a reboot: the attachments do not, either.

mod memory;
mod process;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::memory::{Memory, Remembered};
use crate::conflist::{Conflist, ConflistError, PluginConf};
use crate::error::CniError;
use crate::result::AddResult;
use crate::version::Version;

/// Why a network could not be set up, checked or taken down.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// The plugin answered with an error.
    #[error("CNI plugin {plugin} refused {verb} in network {network}")]
    Refused {
        /// The plugin's binary name.
        plugin: String,
        /// The verb.
        verb: &'static str,
        /// The network's name.
        network: String,
        /// What it said.
        #[source]
        source: CniError,
    },
    /// There is no such binary.
    #[error("no CNI plugin {plugin} in {} (install it there, or correct \"type\" in the configuration)", listed(.folders))]
    Missing {
        /// The plugin's binary name.
        plugin: String,
        /// Where it was looked for.
        folders: Vec<PathBuf>,
    },
    /// The plugin did not end in time and was killed.
    #[error("CNI plugin {plugin} did not finish {verb} within {limit:?} and was stopped")]
    Timeout {
        /// The plugin's binary name.
        plugin: String,
        /// The verb.
        verb: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The plugin ended without a usable answer.
    #[error("CNI plugin {plugin} gave no usable answer to {verb}: {problem}")]
    Garbled {
        /// The plugin's binary name.
        plugin: String,
        /// The verb.
        verb: &'static str,
        /// What was wrong, with what it wrote to its error output.
        problem: String,
    },
    /// The plugin could not be started or talked to.
    #[error("cannot run CNI plugin {path}")]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state folder cannot be used.
    #[error("cannot {step} CNI state {path}")]
    State {
        /// What was being done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A remembered configuration does not parse any more.
    #[error(transparent)]
    Conflist(#[from] ConflistError),
}

fn listed(folders: &[PathBuf]) -> String {
    folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl InvokeError {
    /// The CNI code if the plugin itself refused.
    #[must_use]
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Refused { source, .. } => Some(source.code),
            _ => None,
        }
    }
}

/// One interface of one container in one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The sandbox's id: letters, digits, `_ . -`.
    pub container_id: String,
    /// The pinned namespace; `None` on DEL when it is gone.
    pub netns: Option<PathBuf>,
    /// The interface's name in the container, usually `eth0`.
    pub ifname: String,
    /// `CNI_ARGS` such as `K8S_POD_NAME`; `IgnoreUnknown=1` is added.
    pub args: Vec<(String, String)>,
    /// Values for capabilities (`portMappings`, `bandwidth`...); those that a plugin does not declare are not sent to it.
    pub capabilities: Map<String, Value>,
}

/// What ADD of the whole chain answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Added {
    /// The last plugin's result.
    pub result: AddResult,
    /// The same as it was printed.
    pub raw: Value,
}

/// Runs plugins.
#[derive(Debug, Clone)]
pub struct Invoker {
    /// Where the binaries are, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Where attachments are remembered.
    pub state_dir: PathBuf,
    /// How long one plugin may take for one verb.
    pub timeout: Duration,
}

impl Invoker {
    /// Runs ADD of every plugin in order. When one fails, DEL of the whole chain is run before the error is returned.
    ///
    /// # Errors
    /// The first failure.
    pub fn add(&self, list: &Conflist, attachment: &Attachment) -> Result<Added, InvokeError> {
        let mut raw = None;
        for plugin in &list.plugins {
            match self.call(list, plugin, "ADD", attachment, raw.as_ref()) {
                Ok(answer) => raw = Some(answer),
                Err(error) => {
                    // The first error is the one to show; what DEL could not undo now is undone by the caller's DEL.
                    drop(self.del_chain(list, attachment, raw.as_ref()));
                    return Err(error);
                }
            }
        }
        let raw = raw.unwrap_or_default();
        let added = parse_result(list, &raw).map(|result| Added { result, raw: raw.clone() });
        let kept = added.and_then(|added| {
            self.memory().remember(list, attachment, &raw)?;
            Ok(added)
        });
        if kept.is_err() {
            drop(self.del_chain(list, attachment, Some(&raw)));
        }
        kept
    }

    /// Runs DEL of every plugin in reverse order, with the configuration and result that ADD used; `list` is used when
    /// nothing is remembered. May be repeated, and run without a namespace.
    ///
    /// # Errors
    /// The first failure; run it again then.
    pub fn del(&self, list: &Conflist, attachment: &Attachment) -> Result<(), InvokeError> {
        let file = self.memory().file(&list.name, attachment);
        match Memory::recall(&file)? {
            Some(remembered) => {
                self.del_as_remembered(&file, remembered, attachment.netns.as_deref())?;
            }
            None => self.del_chain(list, attachment, None)?,
        }
        Memory::forget(&file)
    }

    /// Runs DEL for every remembered ADD of a container, whatever its network was called and whether that still has a
    /// configuration. Answers whether there was any.
    ///
    /// # Errors
    /// The first failure; run it again then.
    pub fn del_remembered(
        &self,
        container_id: &str,
        netns: Option<&Path>,
    ) -> Result<bool, InvokeError> {
        let files = self.memory().of_container(container_id)?;
        for file in &files {
            if let Some(remembered) = Memory::recall(file)? {
                self.del_as_remembered(file, remembered, netns)?;
            }
            Memory::forget(file)?;
        }
        Ok(!files.is_empty())
    }

    fn del_as_remembered(
        &self,
        file: &Path,
        remembered: Remembered,
        netns: Option<&Path>,
    ) -> Result<(), InvokeError> {
        let list = Conflist::parse(file, remembered.list.to_string().as_bytes())?;
        let attachment = Attachment { netns: netns.map(Path::to_owned), ..remembered.attachment };
        self.del_chain(&list, &attachment, Some(&remembered.result))
    }

    /// Runs CHECK of every plugin with the remembered result. A success without a look when the list's version is below
    /// 0.4.0, it says `disableCheck`, or nothing is remembered.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self, list: &Conflist, attachment: &Attachment) -> Result<(), InvokeError> {
        if list.version < Version::V0_4_0 || list.disable_check {
            return Ok(());
        }
        let Some(remembered) = Memory::recall(&self.memory().file(&list.name, attachment))? else {
            return Ok(());
        };
        for plugin in &list.plugins {
            self.call(list, plugin, "CHECK", attachment, Some(&remembered.result))?;
        }
        Ok(())
    }

    /// Asks every plugin whether it can serve ADD. A success without a look below version 1.1.0.
    ///
    /// # Errors
    /// The first failure.
    pub fn status(&self, list: &Conflist) -> Result<(), InvokeError> {
        if list.version < Version::V1_1_0 {
            return Ok(());
        }
        for plugin in &list.plugins {
            self.run(list, plugin, "STATUS", &[], conf_for(list, plugin, &Map::new()))?;
        }
        Ok(())
    }

    /// Frees whatever belongs to attachments that are not in `valid` (container id, interface name): first DEL of those
    /// that are remembered here, then GC of every plugin. No ADD or DEL may run meanwhile.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub fn gc(&self, list: &Conflist, valid: &[(String, String)]) -> Result<(), InvokeError> {
        let mut result = Ok(());
        for remembered in self.memory().all()?.into_iter().filter(|r| r.network == list.name) {
            let attachment = &remembered.attachment;
            let known = |(id, ifname): &(String, String)| {
                *id == attachment.container_id && *ifname == attachment.ifname
            };
            if !valid.iter().any(known) {
                result = result.and(self.del(list, attachment));
            }
        }
        if list.version < Version::V1_1_0 || list.disable_gc {
            return result;
        }
        let attachments: Vec<Value> = valid
            .iter()
            .map(|(id, ifname)| serde_json::json!({"containerID": id, "ifname": ifname}))
            .collect();
        for plugin in &list.plugins {
            let mut conf = conf_for(list, plugin, &Map::new());
            conf.insert("cni.dev/valid-attachments".into(), attachments.clone().into());
            conf.insert("cni.dev/attachments".into(), attachments.clone().into());
            result = result.and(self.run(list, plugin, "GC", &[], conf).map(drop));
        }
        result
    }

    fn del_chain(
        &self,
        list: &Conflist,
        attachment: &Attachment,
        result: Option<&Value>,
    ) -> Result<(), InvokeError> {
        for plugin in list.plugins.iter().rev() {
            // prevResult on DEL came with 0.4.0.
            let result = result.filter(|_| list.version >= Version::V0_4_0);
            self.call(list, plugin, "DEL", attachment, result)?;
        }
        Ok(())
    }

    fn call(
        &self,
        list: &Conflist,
        plugin: &PluginConf,
        verb: &'static str,
        attachment: &Attachment,
        prev_result: Option<&Value>,
    ) -> Result<Value, InvokeError> {
        let mut conf = conf_for(list, plugin, &attachment.capabilities);
        if let Some(result) = prev_result {
            conf.insert("prevResult".to_owned(), result.clone());
        }
        let mut args = "IgnoreUnknown=1".to_owned();
        for (key, value) in &attachment.args {
            args.push_str(&format!(";{key}={value}"));
        }
        let netns = attachment.netns.as_deref().unwrap_or(Path::new(""));
        let variables = [
            ("CNI_CONTAINERID", attachment.container_id.clone()),
            ("CNI_NETNS", netns.display().to_string()),
            ("CNI_IFNAME", attachment.ifname.clone()),
            ("CNI_ARGS", args),
        ];
        self.run(list, plugin, verb, &variables, conf)
    }

    /// Runs one plugin once and reads its answer; nothing printed is `null`.
    fn run(
        &self,
        list: &Conflist,
        plugin: &PluginConf,
        verb: &'static str,
        variables: &[(&str, String)],
        conf: Map<String, Value>,
    ) -> Result<Value, InvokeError> {
        let path = self.find(&plugin.kind)?;
        let mut variables = variables.to_vec();
        variables.push(("CNI_COMMAND", verb.to_owned()));
        variables.push(("CNI_PATH", search_path(&self.bin_dirs)));
        let input = Value::Object(conf).to_string();
        let ended = process::run(&path, &variables, input.as_bytes(), self.timeout)
            .map_err(|source| InvokeError::Spawn { path, source })?;
        let name = || plugin.kind.clone();
        match ended {
            process::Ended::TimedOut => {
                Err(InvokeError::Timeout { plugin: name(), verb, limit: self.timeout })
            }
            process::Ended::Success(output) => answer(&output)
                .map_err(|problem| InvokeError::Garbled { plugin: name(), verb, problem }),
            process::Ended::Failure(output) => Err(match serde_json::from_slice(&output.stdout) {
                Ok(source) => InvokeError::Refused {
                    plugin: name(),
                    verb,
                    network: list.name.clone(),
                    source,
                },
                Err(_) => InvokeError::Garbled { plugin: name(), verb, problem: output.describe() },
            }),
        }
    }

    fn find(&self, plugin: &str) -> Result<PathBuf, InvokeError> {
        self.bin_dirs
            .iter()
            .map(|folder| folder.join(plugin))
            .find(|path| path.is_file())
            .ok_or_else(|| InvokeError::Missing {
                plugin: plugin.to_owned(),
                folders: self.bin_dirs.clone(),
            })
    }

    fn memory(&self) -> Memory<'_> {
        Memory { folder: &self.state_dir }
    }
}

/// What a plugin gets on its standard input: its own fields, the list's name and version, and the values of the
/// capabilities that it asked for.
fn conf_for(
    list: &Conflist,
    plugin: &PluginConf,
    capabilities: &Map<String, Value>,
) -> Map<String, Value> {
    let mut conf = plugin.fields.clone();
    conf.remove("capabilities");
    conf.insert("name".to_owned(), list.name.clone().into());
    conf.insert("cniVersion".to_owned(), list.version.as_str().into());
    let wanted: Map<String, Value> = capabilities
        .iter()
        .filter(|(name, _)| plugin.capabilities.contains(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !wanted.is_empty() {
        conf.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    conf
}

pub(crate) fn parse_result(list: &Conflist, raw: &Value) -> Result<AddResult, InvokeError> {
    serde_json::from_value(raw.clone()).map_err(|e| InvokeError::Garbled {
        plugin: list.plugins.last().map(|plugin| plugin.kind.clone()).unwrap_or_default(),
        verb: "ADD",
        problem: format!("{e} in {raw}"),
    })
}

fn answer(output: &process::Output) -> Result<Value, String> {
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}; {}", output.describe()))
}

fn search_path(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":")
}
