use serde_json::json;

use super::*;
use crate::kinds::CONFIG_MAP;
use crate::selectors::Selector;

fn put(name: &str, seen: u64, n: usize) -> Write {
    Write {
        kind: &CONFIG_MAP,
        key: format!("d/{name}"),
        seen,
        value: Some(
            json!({"metadata": {"namespace": "d", "name": name}, "data": {"n": n.to_string()}}),
        ),
    }
}

#[tokio::test]
async fn a_change_needs_the_revision_that_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    let first = store.write(put("a", 0, 1)).await.unwrap();
    assert!(matches!(store.write(put("a", 0, 2)).await, Err(WriteError::Changed)));
    let second = store.write(put("a", first.revision, 2)).await.unwrap();
    assert!(second.revision > first.revision);
    assert!(matches!(store.write(put("a", first.revision, 3)).await, Err(WriteError::Changed)));
}

#[tokio::test]
async fn what_was_stored_is_there_after_a_restart_and_an_idle_watch_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = Store::open(&path).unwrap();
    let a = store.write(put("a", 0, 1)).await.unwrap();
    let b = store.write(put("b", 0, 1)).await.unwrap();
    let delete = Write { kind: &CONFIG_MAP, key: "d/b".into(), seen: b.revision, value: None };
    let gone = store.write(delete).await.unwrap();
    drop(store);
    let store = reopen(&path);
    assert_eq!(store.get(&CONFIG_MAP, "d", "a").unwrap().json, a.json);
    assert!(store.get(&CONFIG_MAP, "d", "b").is_none());
    let watch = |from| Watch::after(store.shared(), &CONFIG_MAP, "", Selector::default(), from);
    assert!(watch(gone.revision).is_ok());
    assert!(watch(b.revision).unwrap_err().is_expired());
    assert!(watch(gone.revision + 1).unwrap_err().is_expired());
}

/// The writer thread of the old store lets go of the file shortly after the last handle is gone.
fn reopen(path: &Path) -> Store {
    loop {
        match Store::open(path) {
            Err(StoreError::InUse { .. }) => std::thread::yield_now(),
            other => return other.unwrap(),
        }
    }
}

#[test]
fn a_foreign_file_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, b"hello, I am a text file").unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(error.to_string().contains("store.redb is not a keelson store"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"hello, I am a text file");
}
