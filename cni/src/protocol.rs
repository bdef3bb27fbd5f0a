//! The rules for names that travel in `CNI_*` variables.

/// Whether `text` may be a network name or container id: a letter or digit, then those and `_ . -`.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Whether the kernel takes `text` as an interface name.
#[must_use]
pub fn is_ifname(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 15
        && text != "."
        && text != ".."
        && !text.bytes().any(|byte| matches!(byte, b'/' | b':') || byte.is_ascii_whitespace())
}
