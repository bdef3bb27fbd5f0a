//! A real registry on loopback, with a password, for tests that pull.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::node::{PATIENCE, read};

/// Who may push and pull.
pub const USER: &str = "puller";
/// With this password.
pub const PASSWORD: &str = "s3cret-for-a-test";
/// bcrypt of [`PASSWORD`], as htpasswd files have it.
const HASH: &str = "$2b$04$rPPQz/Igv.jMHmBA1i5p.utB1c8U.G/dzcvyVAFSUUexA4N.Jv5Ei";

/// docker-registry; it ends with the value.
pub struct Registry {
    child: Child,
    port: u16,
}

impl Registry {
    /// Starts a registry that keeps its files below `folder`.
    ///
    /// # Errors
    /// When docker-registry is not installed or does not answer.
    pub fn start(folder: &Path) -> Result<Registry> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let passwords = folder.join("htpasswd");
        fs::write(&passwords, format!("{USER}:{HASH}\n"))?;
        let config = folder.join("registry.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
                 http: {{addr: \"127.0.0.1:{port}\"}}\nauth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                folder.join("registry").display(),
                passwords.display()
            ),
        )?;
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let registry = Registry { child: command.spawn()?, port };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                bail!("docker-registry does not answer on port {port}");
            }
            std::thread::yield_now();
        }
        Ok(registry)
    }

    /// `localhost:<port>`.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// Pushes the image of an OCI archive as `name:tag` and returns its digest.
    ///
    /// # Errors
    /// As skopeo.
    pub fn push(&self, archive: &Path, name_and_tag: &str) -> Result<String> {
        let target = format!("docker://{}/{name_and_tag}", self.host());
        let digest = archive.with_extension("digest");
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--dest-tls-verify=false", "--dest-creds"]);
        skopeo.arg(format!("{USER}:{PASSWORD}")).arg("--digestfile").arg(&digest);
        skopeo.arg(format!("oci-archive:{}", archive.display())).arg(target);
        read(&mut skopeo)?;
        Ok(fs::read_to_string(digest)?)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It was ours and runs nothing else.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
