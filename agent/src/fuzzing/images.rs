//! Images: names, pull secrets, what registries answer.

use super::text;
use crate::image::Reference;
use crate::pod::image::parse_secret;

/// Names of images.
pub fn image_reference(input: &[u8]) {
    let text = text(input);
    let Ok(reference) = Reference::parse(&text) else { return };
    let whole = reference.to_string();
    let again = Reference::parse(&whole).map(|again| again.to_string());
    assert_eq!(again.ok(), Some(whole), "a whole name is not itself");
}

/// Secrets with logins of registries.
pub fn pull_secret(input: &[u8]) {
    for key in [".dockerconfigjson", ".dockercfg"] {
        drop(parse_secret(&[(key.to_owned(), input.to_vec())].into()));
    }
}
