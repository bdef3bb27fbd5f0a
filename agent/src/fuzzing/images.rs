//! Images: names, pull secrets, what registries answer.

use tokio::sync::mpsc;

use super::text;
use crate::image::Reference;
use crate::image::content::{self, Manifest};
use crate::image::import::{Blob, read_entries};
use crate::image::pull::{names_plain, select_platform};
use crate::image::unpack::{ConfigFile, chain_ids};
use crate::pod::image::parse_secret;
use crate::runtime::types::ContainerSecurity;
use crate::runtime::user::from_files;

/// Names of images.
pub fn image_reference(input: &[u8]) {
    let text = text(input);
    let Ok(reference) = Reference::parse(&text) else { return };
    let whole = reference.to_string();
    let again = Reference::parse(&whole).map(|again| again.to_string());
    assert_eq!(again.ok(), Some(whole), "a whole name is not itself");
    let repository = reference.repository();
    assert!(repository.split('/').all(|part| !matches!(part, "" | "." | "..")), "{repository}");
    assert!(!repository.contains(['?', '#', '@', '\\', '%']), "{repository}");
}

/// Secrets with logins of registries.
pub fn pull_secret(input: &[u8]) {
    for key in [".dockerconfigjson", ".dockercfg"] {
        drop(parse_secret(&[(key.to_owned(), input.to_vec())].into()));
    }
}

/// A manifest or an index, and an image's configuration behind it.
pub fn image_documents(input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    let Ok(manifest) = content::parse::<Manifest>("manifest", "", parts.next().unwrap_or_default())
    else {
        return;
    };
    if let Ok(chosen) = select_platform(&manifest.manifests, "image") {
        assert!(manifest.manifests.iter().any(|entry| entry.digest == chosen.digest));
    }
    let config: Result<ConfigFile, _> =
        content::parse("configuration", "", parts.next().unwrap_or_default());
    if let Ok(config) = config {
        let ids = config.rootfs.diff_ids;
        assert_eq!(chain_ids(&ids).len(), ids.len());
    }
}

/// An archive of images.
pub fn image_archive(input: &[u8]) {
    let (sender, mut blobs) = mpsc::channel::<Blob>(1);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || drop(read_entries(input, &sender)));
        let mut received = 0;
        while let Some(mut blob) = blobs.blocking_recv() {
            while let Some(part) = blob.parts.blocking_recv() {
                received += part.map_or(0, |part| part.len());
            }
        }
        assert!(reader.join().is_ok(), "the reader of an archive panicked");
        assert!(received <= input.len(), "more came out of an archive than is in it");
    });
}

/// Users and groups of an image, after a line with the user that is wanted.
pub fn image_users(input: &[u8]) {
    let text = text(input);
    let mut parts = text.splitn(3, '\n');
    let mut next = || parts.next().unwrap_or_default();
    let (user, first, rest) = (next(), next(), next());
    for run_as_user in [None, Some(1000)] {
        let security = ContainerSecurity {
            run_as_user,
            run_as_non_root: first.len() % 2 == 0,
            ..ContainerSecurity::default()
        };
        let found = from_files(user, &security, rest.as_bytes(), rest.as_bytes());
        if let Ok(found) = found {
            assert!(!security.run_as_non_root || found.uid != 0, "root despite runAsNonRoot");
        }
    }
}

/// `hosts.toml` of a registry, after a line with the registry's name.
pub fn hosts_toml(input: &[u8]) {
    let text = text(input);
    let (registry, file) = text.split_once('\n').unwrap_or(("", &text));
    assert!(!names_plain(file, registry) || file.contains("http://"));
}
