//! The lanes of tests under another kernel, one of Debian's in an emulated machine, with the same test binaries as here.
//!
//! The machine has no disk and no network card: its file system is an archive made here, its results come over the serial console.

mod cpio;
mod kernel;
mod modules;
pub(crate) mod node;
pub(crate) mod programs;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::build::{self, Profile};
use crate::shell;
use cpio::Archive;
pub(crate) use kernel::{Kernel, Version};

/// A machine that is not done by then hangs.
const BOUND: Duration = Duration::from_secs(1200);
/// The last line of a run, before the exit code.
const END: &str = "keelson-vm: exit code ";
/// What is shown of the console when the machine hangs.
const TAIL: usize = 40;
/// What every node needs.
const NODE_MODULES: &[&str] = &[
    "veth",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_hash",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_redir",
    "nft_reject_inet",
    "nf_conntrack_netlink",
    "inet_diag",
    "tcp_diag",
];
/// What the rows of the suite need beside that.
const MODULES: &[&str] = &[
    "bridge",
    "dummy",
    "sctp",
    "nft_compat",
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_wrr",
    "ip_vs_lc",
    "ip_vs_wlc",
    "ip_vs_sh",
    "ip_vs_mh",
    "ip_vs_sed",
    "ip_vs_nq",
    "udp_diag",
    "cls_bpf",
    "sch_ingress",
    "tun",
    "nfsv4",
];

/// Runs the proxy's behaviour suite in the machine.
///
/// # Errors
/// When a row fails, or the machine does not start or come to an end.
pub(crate) fn run(kernel: &Kernel, arguments: &[String]) -> Result<()> {
    let suite = Suite::build()?;
    let archive = build::target_dir().join("vm-initramfs");
    std::fs::write(&archive, initramfs(kernel, &suite, arguments)?)?;
    boot(kernel, &archive, 2048)
}

/// Runs the machine with `memory` MiB until its tests have ended.
fn boot(kernel: &Kernel, archive: &Path, memory: u32) -> Result<()> {
    let mut machine = start(kernel, archive, memory)?;
    let result = watch(&mut machine);
    machine.kill().context("cannot stop the machine")?;
    machine.wait()?;
    result
}

/// The very binaries that `cargo test` runs here.
struct Suite {
    suite: PathBuf,
    /// The suite looks for it where cargo has put it.
    proxy: PathBuf,
}

impl Suite {
    fn build() -> Result<Suite> {
        let suite = stripped(&test_binary("keelson-proxy", "services")?)?;
        Ok(Suite { suite, proxy: build::target_dir().join("debug/keelson-proxy") })
    }
}

/// Builds a test of a package and returns its program.
fn test_binary(package: &str, name: &str) -> Result<PathBuf> {
    let mut cargo = build::cargo("test", Profile::Dev);
    cargo.args(["-p", package, "--test", name, "--no-run"]);
    executable(&mut cargo, name)
}

/// A copy of a program without what only a debugger reads, which is most of it: all files of the machine are in memory.
fn stripped(program: &Path) -> Result<PathBuf> {
    let folder = build::target_dir().join("vm-programs");
    std::fs::create_dir_all(&folder)?;
    let small = folder.join(program.file_name().context("a program without a name")?);
    shell::run(Command::new("strip").arg("-o").arg(&small).arg(program))?;
    Ok(small)
}

/// Runs cargo and returns the program of that name that it built.
fn executable(cargo: &mut Command, name: &str) -> Result<PathBuf> {
    shell::read(cargo.arg("--message-format=json"))?
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo names no executable of `{name}`"))
}

fn initramfs(kernel: &Kernel, suite: &Suite, arguments: &[String]) -> Result<Vec<u8>> {
    let mut archive = root();
    let programs = [
        ("bin/busybox".to_owned(), program("busybox")?),
        ("bin/nft".to_owned(), program("nft")?),
        ("bin/suite".to_owned(), suite.suite.clone()),
    ];
    add_programs(&mut archive, &programs)?;
    archive.with_folders(&suite.proxy, &read(&stripped(&suite.proxy)?)?);
    add_libraries(&mut archive, [&suite.proxy])?;
    add_certificates(&mut archive)?;
    add_modules(&mut archive, kernel, MODULES)?;
    archive.program("init", init(&commands(arguments)).as_bytes());
    Ok(archive.finish())
}

/// The folders of a first file system.
fn root() -> Archive {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "run", "tmp", "var", "lib", "lib64"] {
        archive.folder(folder);
    }
    archive
}

/// Adds programs under the names that they have there, and the libraries that they need.
fn add_programs(archive: &mut Archive, programs: &[(String, PathBuf)]) -> Result<()> {
    for (inside, path) in programs {
        archive.program(inside, &read(path)?);
    }
    add_libraries(archive, programs.iter().map(|(_, path)| path))
}

/// Adds libraries where they are here, as the loader finds them.
fn add_libraries<'p>(
    archive: &mut Archive,
    programs: impl IntoIterator<Item = &'p PathBuf>,
) -> Result<()> {
    let mut all = BTreeSet::new();
    for program in programs {
        all.extend(libraries(program)?);
    }
    for library in all {
        archive.with_folders(&library, &read(&library)?);
    }
    Ok(())
}

/// The clients of an API server want the system's, whether their server has one of them or not.
fn add_certificates(archive: &mut Archive) -> Result<()> {
    let certificates = Path::new("/etc/ssl/certs/ca-certificates.crt");
    if certificates.is_file() {
        archive.with_folders(certificates, &read(certificates)?);
    }
    Ok(())
}

/// Adds these modules and those of every node so that their names are in the order in which they can be loaded.
fn add_modules(archive: &mut Archive, kernel: &Kernel, wanted: &[&str]) -> Result<()> {
    archive.folder("modules");
    let wanted = [NODE_MODULES, wanted].concat();
    let files = modules::in_order(&kernel.modules_dep()?, &wanted);
    for (number, file) in files.iter().enumerate() {
        let content = modules::read(&kernel.modules().join(file))?;
        archive.program(&format!("modules/{number:03}.ko"), &content);
    }
    Ok(())
}

/// Where a program of the PATH, or of an administrator's, is.
fn program(name: &str) -> Result<PathBuf> {
    let find = format!("PATH=$PATH:/usr/sbin:/sbin command -v {name}");
    Ok(PathBuf::from(shell::read(Command::new("sh").args(["-c", &find]))?.trim()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The shared libraries of a program, by ldd, which fails for one that is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().filter(|w| w.starts_with('/')).map(PathBuf::from).collect())
}

/// The modes whose programs are in the machine; few random histories, which take long under emulation, and of mode ebpf,
/// which has the verifier look at its programs in each row, those rows that another kernel may decide otherwise.
const USUAL: [&[&str]; 2] = [
    &["--backend", "nftables", "--backend", "ipvs", "--histories", "5"],
    &[
        "--backend",
        "ebpf",
        "--silence-ms",
        "3000",
        "ebpf::behaviour",
        "ebpf::direct",
        "ebpf::ebpf",
        "ebpf::kernel_clients",
        "ebpf::needs",
        "cgroup_that_is_gone",
        "clean_up",
        "damage",
        "interfaces_that_vanish",
        "loss_of_a_filter",
        "one_source_port",
        "sctp",
        "sticky",
        "strict_checks",
        "too_long",
        "udp",
    ],
];

/// Runs the suite with these arguments, or as usual.
fn commands(arguments: &[String]) -> String {
    let mut commands = "code=0\n".to_owned();
    if !arguments.is_empty() {
        commands += &format!("suite {} || code=$?\n", quoted(arguments));
        return commands;
    }
    for usual in USUAL {
        let usual: Vec<String> = usual.iter().map(|word| (*word).to_owned()).collect();
        commands += &format!("suite {} || code=$?\n", quoted(&usual));
    }
    commands
}

/// What the machine does: these commands, which set `code`.
fn init(commands: &str) -> String {
    format!(
        "#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in /modules/*; do insmod $module || echo \"insmod $module failed\"; done
ip link set lo up
# Nobody else has this machine: even its clock may be set.
export KEELSON_TEST_OWN_MACHINE=yes
{commands}
echo \"{END}$code\"
poweroff -f
"
    )
}

/// Arguments as a shell takes them.
fn quoted(arguments: &[String]) -> String {
    arguments.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ")
}

fn start(kernel: &Kernel, archive: &Path, memory: u32) -> Result<Child> {
    // setpriv: the machine goes with this process, also when that is killed.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi"])
        .args(["-cpu", "max", "-smp", "2", "-m", &memory.to_string()])
        .args(["-nodefaults", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio", "-kernel"])
        .arg(kernel.image())
        .arg("-initrd")
        .arg(archive)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run setpriv qemu-system-x86_64")
}

/// Shows the console until the suite is done.
fn watch(machine: &mut Child) -> Result<()> {
    let console = machine.stdout.take().context("the machine has no console")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + BOUND;
    let mut seen: Vec<String> = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{line}");
                match line.strip_prefix(END) {
                    Some("0") => return Ok(()),
                    Some(code) => bail!("the suite in the machine ended with {code}"),
                    None => seen.push(line),
                }
            }
            Err(why) => {
                let tail = seen.split_off(seen.len().saturating_sub(TAIL)).join("\n");
                bail!("the machine did not finish ({why}); its console ended with:\n{tail}");
            }
        }
    }
}
