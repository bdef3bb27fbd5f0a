//! Runs `iptables-save` and `iptables-restore`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use keelson_netlink::netns::{Netns, NetnsError};

use super::restore::Script;
use crate::model::Family;

/// The two programs of that name: one speaks to nf_tables, the other to the old kernel interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Variant {
    Nft,
    Legacy,
}

impl Variant {
    pub const BOTH: [Variant; 2] = [Variant::Nft, Variant::Legacy];

    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        }
    }
}

/// A step in which a program of the iptables package failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("{0} is not installed: it is part of the package iptables")]
    Missing(String),
    #[error("cannot run {program}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} failed: {complaint}")]
    Failed { program: String, complaint: String },
    #[error("cannot run a program in the proxy's network namespace")]
    Namespace(#[from] NetnsError),
}

/// Runs the programs of one variant in one network namespace.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) variant: Variant,
    pub(crate) netns: Netns,
}

impl Programs {
    /// Programs for the calling thread's network namespace.
    pub(crate) fn new(variant: Variant) -> Result<Self, ProgramError> {
        Ok(Programs { variant, netns: Netns::current()? })
    }

    /// How many chains a transaction may name: the time of `iptables-nft-restore` grows with their square.
    pub(crate) fn chains_per_transaction(&self) -> usize {
        match self.variant {
            Variant::Nft => 200,
            // Each transaction reads and replaces the whole table.
            Variant::Legacy => usize::MAX,
        }
    }

    /// The address families that this kernel knows.
    pub(crate) fn families(&self) -> Vec<Family> {
        let known =
            |family: &Family| *family == Family::V4 || Path::new("/proc/sys/net/ipv6").exists();
        Family::BOTH.into_iter().filter(known).collect()
    }

    /// Both programs are there for all families.
    pub(crate) fn check(&self) -> Result<(), ProgramError> {
        for family in self.families() {
            for task in ["save", "restore"] {
                self.find(family, task)?;
            }
        }
        Ok(())
    }

    /// All rules of a family, as text; of one table only when that is named.
    pub(crate) fn save(&self, family: Family, table: Option<&str>) -> Result<String, ProgramError> {
        let (program, mut command) = self.command(family, "save")?;
        if let Some(table) = table {
            command.args(["-t", table]);
        }
        let output = self.run(&program, command, None, &mut Vec::new())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // With the program's exit code 0: somebody's rules in there that iptables cannot show.
        let incompatible = ["nat", "filter"].iter().any(|table| {
            text.contains(&format!("# Table `{table}' is incompatible, use 'nft' tool."))
        });
        if incompatible {
            let complaint = "somebody put rules into the tables nat or filter with nft that iptables \
                cannot read: remove them (nft list ruleset), or use --proxy-mode=nftables";
            return Err(ProgramError::Failed { program, complaint: complaint.to_owned() });
        }
        Ok(text)
    }

    /// Puts changes in force; what is not named in them stays. Notes the program's process id, also when it fails:
    /// some of its transactions may have taken effect.
    pub(crate) fn restore(
        &self,
        family: Family,
        script: &Script,
        pids: &mut Vec<u32>,
    ) -> Result<(), ProgramError> {
        let (program, mut command) = self.command(family, "restore")?;
        command.args(["--noflush", "--wait=10"]);
        match self.run(&program, command, Some(script.text.as_bytes()), pids) {
            Err(ProgramError::Failed { program, complaint }) => {
                let complaint = with_line(&complaint, &script.text);
                Err(ProgramError::Failed { program, complaint })
            }
            result => result.map(drop),
        }
    }

    /// Lets the program check rules without putting them in force.
    pub(crate) fn test(&self, family: Family, script: &Script) -> Result<(), ProgramError> {
        let (program, mut command) = self.command(family, "restore")?;
        command.args(["--noflush", "--test"]);
        self.run(&program, command, Some(script.text.as_bytes()), &mut Vec::new()).map(drop)
    }

    /// Whether the family has any rules in this variant. Makes no tables.
    pub(crate) fn is_in_use(&self, family: Family) -> bool {
        match self.variant {
            // Tables that the kernel has made; iptables-legacy-save would make those that it is asked for.
            Variant::Legacy => {
                let name = match family {
                    Family::V4 => "ip_tables_names",
                    Family::V6 => "ip6_tables_names",
                };
                let path = format!("/proc/thread-self/net/{name}");
                let read = self.netns.run(|| std::fs::read_to_string(path));
                read.ok().and_then(Result::ok).is_some_and(|names| !names.trim().is_empty())
            }
            Variant::Nft => true,
        }
    }

    /// Runs `work` in the namespace.
    pub(crate) fn within<T: Send>(
        &self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, ProgramError> {
        Ok(self.netns.run(work)?)
    }

    fn command(&self, family: Family, task: &str) -> Result<(String, Command), ProgramError> {
        let path = self.find(family, task)?;
        let mut command = Command::new(&path);
        command.env("LC_ALL", "C");
        Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), command))
    }

    fn find(&self, family: Family, task: &str) -> Result<PathBuf, ProgramError> {
        let program = match family {
            Family::V4 => format!("iptables-{}-{task}", self.variant.word()),
            Family::V6 => format!("ip6tables-{}-{task}", self.variant.word()),
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        // A service's PATH may lack the folders of the administrator's programs.
        let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        let mut found = folders.map(|folder| folder.join(&program)).filter(|path| path.is_file());
        found.next().ok_or(ProgramError::Missing(program))
    }

    fn run(
        &self,
        program: &str,
        mut command: Command,
        input: Option<&[u8]>,
        pids: &mut Vec<u32>,
    ) -> Result<Output, ProgramError> {
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let fail = |source| ProgramError::Run { program: program.to_owned(), source };
        // The child starts in the namespace of the thread that makes it.
        let mut child = self.netns.run(|| command.spawn())?.map_err(fail)?;
        pids.push(child.id());
        let stdin = child.stdin.take();
        let (written, output) = std::thread::scope(|scope| {
            let writer = scope.spawn(move || match (stdin, input) {
                (Some(mut stdin), Some(input)) => stdin.write_all(input),
                _ => Ok(()),
            });
            (writer.join(), child.wait_with_output())
        });
        let output = output.map_err(fail)?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            let complaint =
                if complaint.is_empty() { output.status.to_string() } else { complaint };
            return Err(ProgramError::Failed { program: program.to_owned(), complaint });
        }
        if let Ok(Err(source)) = written {
            return Err(fail(source));
        }
        Ok(output)
    }
}

/// Quotes the line of the input that the program complains about.
fn with_line(complaint: &str, text: &str) -> String {
    let after = |word: &str| complaint.split(word).nth(1);
    let number = after("line ")
        .or(after("line: "))
        .map(|rest| rest.trim_start().chars().take_while(char::is_ascii_digit).collect::<String>());
    let line = number
        .and_then(|number| number.parse::<usize>().ok())
        .and_then(|number| text.lines().nth(number.checked_sub(1)?));
    match line {
        Some(line) => format!("{complaint} (the line is {line:?})"),
        None => complaint.to_owned(),
    }
}

/// The variant that the rest of the node uses, as Kubernetes' images find out: the kubelet leaves a
/// hint in one of them; without it, the one with more rules.
pub(crate) fn chosen_by_node() -> Result<Variant, ProgramError> {
    const HINTS: [&str; 2] = [":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY "];
    let mut rules = [0, 0];
    for (variant, rules) in Variant::BOTH.into_iter().zip(&mut rules) {
        let programs = Programs::new(variant)?;
        if programs.check().is_err() {
            continue;
        }
        for family in programs.families() {
            if !programs.is_in_use(family) {
                continue;
            }
            let Ok(text) = programs.save(family, None) else { continue };
            if text.lines().any(|line| HINTS.iter().any(|hint| line.starts_with(hint))) {
                return Ok(variant);
            }
            // What we left in the one that was used until now must not outvote the others.
            let foreign =
                |line: &&str| line.starts_with("-A ") && !line.contains(super::names::PREFIX);
            *rules += text.lines().filter(foreign).count();
        }
    }
    let legacy_is_there = Programs::new(Variant::Legacy)?.check().is_ok();
    let nft_is_there = Programs::new(Variant::Nft)?.check().is_ok();
    let legacy = legacy_is_there && (rules[1] > rules[0] || !nft_is_there);
    Ok(if legacy { Variant::Legacy } else { Variant::Nft })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_names_the_line() {
        let text = "*nat\n-A A -j B\nCOMMIT\n";
        let complaint = with_line("iptables-restore: line 2 failed", text);
        assert!(complaint.ends_with("(the line is \"-A A -j B\")"), "{complaint}");
        assert_eq!(with_line("no luck", text), "no luck");
    }
}
