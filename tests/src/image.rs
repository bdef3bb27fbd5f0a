//! OCI image archives made from files at hand, so that neither a try-out nor a test needs a registry.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

/// A file system with one static busybox in it, and what an image says besides.
#[derive(Debug, Default)]
pub struct ImageSpec {
    /// The name that the archive carries, e.g. `localhost/keelson/web:1`.
    pub name: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    /// More files: path in the image (without the leading slash) to content.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Writes an OCI archive of `spec` over the host's static busybox.
///
/// # Errors
/// When `/bin/busybox` is missing or `archive` cannot be written.
pub fn write_busybox_archive(spec: &ImageSpec, archive: &Path) -> Result<()> {
    let layer = busybox_layer(spec)?;
    let layer_digest = digest(&layer);
    let mut env = vec!["PATH=/usr/local/bin:/bin:/usr/bin".to_owned()];
    env.extend_from_slice(&spec.env);
    let config = serde_json::to_vec(&json!({
        "architecture": architecture(), "os": "linux",
        "config": {
            "Entrypoint": spec.entrypoint, "Cmd": spec.cmd, "User": spec.user,
            "Env": env,
        },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": spec.name,
        "org.opencontainers.image.ref.name": spec.name.rsplit(':').next(),
    });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;

    let file = fs::File::create(archive)
        .with_context(|| format!("cannot create {}", archive.display()))?;
    let mut tar = tar::Builder::new(file);
    append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", 0o644, &index)?;
    for blob in [&layer, &config, &manifest] {
        append(
            &mut tar,
            &format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]),
            0o644,
            blob,
        )?;
    }
    tar.finish()?;
    Ok(())
}

fn busybox_layer(spec: &ImageSpec) -> Result<Vec<u8>> {
    let busybox =
        fs::read("/bin/busybox").context("cannot read /bin/busybox (Debian: busybox-static)")?;
    let listing =
        Command::new("/bin/busybox").arg("--list").output().context("cannot run busybox")?;
    let mut tar = tar::Builder::new(Vec::new());
    for dir in [
        "bin/", "etc/", "tmp/", "www/", "usr/", "usr/bin/", "proc/", "sys/", "dev/", "var/",
        "root/",
    ] {
        let mode = if dir == "tmp/" { 0o1777 } else { 0o755 };
        append_entry(&mut tar, dir, mode, tar::EntryType::Directory, None, &[])?;
    }
    append(&mut tar, "bin/busybox", 0o755, &busybox)?;
    for applet in String::from_utf8_lossy(&listing.stdout).lines().filter(|a| *a != "busybox") {
        let path = format!("bin/{applet}");
        append_entry(&mut tar, &path, 0o777, tar::EntryType::Symlink, Some("busybox"), &[])?;
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/tmp:/bin/sh\n";
    append(&mut tar, "etc/passwd", 0o644, passwd.as_bytes())?;
    append(&mut tar, "etc/group", 0o644, b"root:x:0:\nweb:x:1000:\nstaff:x:50:web\n")?;
    for (path, content) in &spec.files {
        append(&mut tar, path, 0o755, content)?;
    }
    Ok(tar.into_inner()?)
}

fn append(
    tar: &mut tar::Builder<impl std::io::Write>,
    path: &str,
    mode: u32,
    data: &[u8],
) -> Result<()> {
    append_entry(tar, path, mode, tar::EntryType::Regular, None, data)
}

fn append_entry(
    tar: &mut tar::Builder<impl std::io::Write>,
    path: &str,
    mode: u32,
    kind: tar::EntryType,
    link: Option<&str>,
    data: &[u8],
) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(data.len() as u64);
    match link {
        Some(target) => tar.append_link(&mut header, path, target)?,
        None => tar.append_data(&mut header, path, data)?,
    }
    Ok(())
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

fn digest(blob: &[u8]) -> String {
    let hex: String = Sha256::digest(blob).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_holds_every_blob_that_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.tar");
        write_busybox_archive(
            &ImageSpec { name: "localhost/t:1".into(), ..ImageSpec::default() },
            &path,
        )
        .unwrap();
        let mut names = Vec::new();
        for entry in tar::Archive::new(fs::File::open(&path).unwrap()).entries().unwrap() {
            names.push(entry.unwrap().path().unwrap().display().to_string());
        }
        assert_eq!(names.len(), 5);
        assert!(names.contains(&"index.json".to_owned()));
    }
}
