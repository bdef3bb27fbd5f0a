//! The forms of names. Each function says what is wrong, in Kubernetes' words, or nothing.

fn is_lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_lower_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.first().copied().is_some_and(is_lower)
        && bytes.last().copied().is_some_and(is_lower)
        && bytes.iter().all(|b| is_lower(*b) || *b == b'-')
}

fn longer_than(text: &str, most: usize) -> Option<String> {
    (text.len() > most).then(|| format!("must be no more than {most} characters"))
}

/// RFC 1123 label.
pub(super) fn label(text: &str) -> Option<String> {
    longer_than(text, 63).or_else(|| {
        (!is_lower_label(text)).then(|| {
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')".to_owned()
        })
    })
}

/// RFC 1035 label, which starts with a letter.
pub(super) fn label_1035(text: &str) -> Option<String> {
    let starts = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    longer_than(text, 63).or_else(|| {
        (!starts || !is_lower_label(text)).then(|| {
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')".to_owned()
        })
    })
}

/// RFC 1123 subdomain.
pub(super) fn subdomain(text: &str) -> Option<String> {
    longer_than(text, 253).or_else(|| {
        (!text.split('.').all(is_lower_label)).then(|| {
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')".to_owned()
        })
    })
}

fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

/// A label's or annotation's key: `prefix/name` or `name`.
pub(super) fn qualified(text: &str) -> Option<String> {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    if let Some(prefix) = prefix {
        if prefix.is_empty() {
            return Some("prefix part must be non-empty".to_owned());
        }
        if let Some(why) = subdomain(prefix) {
            return Some(format!("prefix part {why}"));
        }
    }
    if name.is_empty() {
        return Some("name part must be non-empty".to_owned());
    }
    if name.len() > 63 {
        return Some("name part must be no more than 63 characters".to_owned());
    }
    (!is_word(name)).then(|| {
        "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')".to_owned()
    })
}

pub(super) fn label_value(text: &str) -> Option<String> {
    longer_than(text, 63).or_else(|| {
        (!text.is_empty() && !is_word(text)).then(|| {
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')".to_owned()
        })
    })
}

/// A key of a ConfigMap or Secret, which may become a file's name.
pub(super) fn config_key(text: &str) -> Option<String> {
    if text == "." || text == ".." || text.starts_with("..") {
        return Some("must not be '.' or start with '..'".to_owned());
    }
    let fits =
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    longer_than(text, 253).or_else(|| {
        (!fits).then(|| {
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned()
        })
    })
}

/// An environment variable: printable ASCII without `=`.
pub(super) fn variable(text: &str) -> Option<String> {
    let fits = text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=');
    (!fits).then(|| {
        "a valid environment variable name must consist only of printable ASCII characters other than '='".to_owned()
    })
}

/// The name of a port: an IANA service name.
pub(super) fn port_name(text: &str) -> Option<String> {
    if text.len() > 15 {
        return Some("must be no more than 15 characters".to_owned());
    }
    if !text.bytes().all(|b| is_lower(b) || b == b'-') {
        return Some(
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned(),
        );
    }
    if !text.bytes().any(|b| b.is_ascii_lowercase()) {
        return Some("must contain at least one letter (a-z)".to_owned());
    }
    let hyphens = text.contains("--") || text.starts_with('-') || text.ends_with('-');
    hyphens.then(|| "must not contain consecutive hyphens, or begin or end with one".to_owned())
}
