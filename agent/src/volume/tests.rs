use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::env::{FieldContext, Keys, Objects};

struct Lab {
    dir: tempfile::TempDir,
    objects: Objects,
    tokens: Tokens,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, objects: Objects::default(), tokens: Tokens::new() }
    }

    fn config_map(&mut self, name: &str, keys: &[(&str, &str)]) {
        let keys: Keys =
            keys.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect();
        self.objects.config_maps.insert(name.into(), Some(Arc::new(keys)));
    }

    fn ensure(&self, volume: serde_json::Value) -> Result<PathBuf, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "web", "uid": "u1", "labels": { "a": "1" } },
            "spec": { "containers": [], "volumes": [volume] },
        }))
        .unwrap();
        let allocatable = BTreeMap::new();
        let fields =
            FieldContext { pod_ips: &[], host_ips: &[], node_name: "n", allocatable: &allocatable };
        let context =
            ContentContext { objects: &self.objects, fields: &fields, tokens: &self.tokens };
        let volumes = PodVolumes::new(self.dir.path(), "u1");
        let mounted = volumes.ensure(&pod, &context).map_err(|e| e.to_string())?;
        Ok(mounted.into_values().next().unwrap())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Volumes are mounted where the tests run as root.
        teardown::remove_pod_dir(&PodVolumes::new(self.dir.path(), "u1").pod_dir).unwrap();
    }
}

#[test]
fn secrets_live_in_memory_where_root_runs_the_agent() {
    let mut lab = Lab::new();
    lab.objects
        .secrets
        .insert("s".into(), Some(Arc::new(Keys::from([("k".into(), b"v".to_vec())]))));
    let dir = lab.ensure(json!({ "name": "v", "secret": { "secretName": "s" } })).unwrap();
    let again = lab.ensure(json!({ "name": "v", "secret": { "secretName": "s" } })).unwrap();
    assert_eq!((fs::read(dir.join("k")).unwrap(), &dir), (b"v".to_vec(), &again));
    let mounts = keelson_procfs::own_mounts().unwrap();
    let own = mounts.iter().filter(|mount| mount.point == dir && mount.kind == "tmpfs");
    assert_eq!(own.count(), usize::from(nix::unistd::geteuid().is_root()));
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = entries.filter(|n| !n.starts_with("..")).collect();
    names.sort();
    names
}

#[test]
fn config_maps_are_switched_at_once_and_not_rewritten_when_equal() {
    let mut lab = Lab::new();
    let volume = || json!({ "name": "v", "configMap": { "name": "cm", "defaultMode": 0o600 } });
    lab.config_map("cm", &[("a", "1"), ("b", "2")]);
    let dir = lab.ensure(volume()).unwrap();
    let first = fs::read_link(dir.join("..data")).unwrap();
    assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
    assert_eq!(fs::metadata(dir.join("a")).unwrap().permissions().mode() & 0o777, 0o600);
    lab.ensure(volume()).unwrap();
    assert_eq!(fs::read_link(dir.join("..data")).unwrap(), first);
    lab.config_map("cm", &[("a", "9"), ("c", "3")]);
    lab.ensure(volume()).unwrap();
    assert_eq!(names(&dir), ["a", "c"]);
    assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "9");
    assert!(!dir.join(first).exists());
    fs::remove_file(dir.join("a")).unwrap();
    lab.ensure(volume()).unwrap();
    assert_eq!(names(&dir), ["a", "c"]);
}

#[test]
fn items_and_missing_objects() {
    let mut lab = Lab::new();
    lab.config_map("cm", &[("a", "1"), ("b", "2")]);
    let with = |items: serde_json::Value, name: &str, optional: bool| json!({ "name": "v", "configMap": { "name": name, "items": items, "optional": optional } });
    let item = |key: &str, path: &str| json!([{ "key": key, "path": path, "mode": 0o400 }]);
    let dir = lab.ensure(with(item("a", "x/y"), "cm", false)).unwrap();
    assert_eq!(fs::read_to_string(dir.join("x/y")).unwrap(), "1");
    let error = lab.ensure(with(item("no", "x"), "cm", false)).unwrap_err();
    assert_eq!(error, "volume \"v\": configmap \"cm\" has no key \"no\"");
    let error = lab.ensure(with(json!([]), "gone", false)).unwrap_err();
    assert_eq!(error, "volume \"v\": configmap \"gone\" not found");
    assert_eq!(names(&lab.ensure(with(json!([]), "gone", true)).unwrap()), [""; 0]);
    let error = lab.ensure(with(item("a", "../x"), "cm", false)).unwrap_err();
    assert!(error.contains(".."), "{error}");
}

#[test]
fn projected_volumes_merge_their_sources() {
    let mut lab = Lab::new();
    lab.config_map("ca", &[("ca.crt", "CA")]);
    lab.tokens.insert(("v".into(), "token".into()), "T".into());
    let volume = json!({ "name": "v", "projected": { "sources": [
        { "serviceAccountToken": { "path": "token" } },
        { "configMap": { "name": "ca" } },
        { "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] } },
    ] } });
    let dir = lab.ensure(volume).unwrap();
    assert_eq!(names(&dir), ["ca.crt", "labels", "token"]);
    assert_eq!(fs::read_to_string(dir.join("labels")).unwrap(), "a=\"1\"");
}

#[test]
fn empty_dirs_are_open_to_all_and_survive_a_second_look() {
    let lab = Lab::new();
    let volume = || json!({ "name": "v", "emptyDir": {} });
    let dir = lab.ensure(volume()).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o777);
    fs::write(dir.join("x"), "kept").unwrap();
    lab.ensure(volume()).unwrap();
    assert!(dir.join("x").exists());
}

#[test]
fn host_paths_are_checked() {
    let lab = Lab::new();
    let root = lab.dir.path().display().to_string();
    let volume =
        |path: &str, kind: &str| json!({ "name": "v", "hostPath": { "path": path, "type": kind } });
    assert!(lab.ensure(volume(&root, "Directory")).is_ok());
    assert!(lab.ensure(volume(&format!("{root}/new"), "DirectoryOrCreate")).is_ok());
    let error = lab.ensure(volume(&root, "File")).unwrap_err();
    assert_eq!(error, format!("volume \"v\": hostPath {root} is not a file"));
    assert!(lab.ensure(volume(&format!("{root}/gone"), "Socket")).is_err());
}

#[test]
fn unknown_volumes_are_named() {
    let lab = Lab::new();
    let error =
        lab.ensure(json!({ "name": "v", "nfs": { "server": "s", "path": "/" } })).unwrap_err();
    assert_eq!(error, "volume \"v\": nfs volumes are not supported by this node");
}

#[test]
fn sub_paths_cannot_leave_the_volume() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, target) = (dir.path().join("v"), dir.path().join("t"));
    fs::create_dir(&volume).unwrap();
    std::os::unix::fs::symlink("/etc", volume.join("evil")).unwrap();
    for bad in ["../x", "/etc", "evil", "evil/passwd", "a/../../x"] {
        assert!(subpath::bind(&volume, bad, &target).is_err(), "{bad}");
    }
    assert!(!target.exists());
}

#[test]
fn a_data_link_to_anywhere_else_is_not_followed() {
    let mut lab = Lab::new();
    let volume = || json!({ "name": "v", "configMap": { "name": "cm" } });
    lab.config_map("cm", &[("a", "1")]);
    let dir = lab.ensure(volume()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("a"), "1").unwrap();
    for target in [elsewhere.path(), Path::new("/"), Path::new("../.."), Path::new("..data")] {
        fs::remove_file(dir.join("..data")).unwrap();
        std::os::unix::fs::symlink(target, dir.join("..data")).unwrap();
        lab.ensure(volume()).unwrap();
        let data = fs::read_link(dir.join("..data")).unwrap();
        assert!(data.to_string_lossy().starts_with("..2"), "{data:?}");
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
    }
}

#[test]
fn a_publish_that_fails_leaves_no_copy_behind() {
    let dir = tempfile::tempdir().unwrap();
    let file = |data: &str| atomic::File { mode: 0o644, data: data.into() };
    // A file cannot also be a folder: the second name fails after the first was written.
    let files = atomic::Files::from([("a".into(), file("secret")), ("a/b".into(), file("x"))]);
    assert!(atomic::publish(dir.path(), &files, None).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
