//! Image names: `nginx` means `docker.io/library/nginx:latest`.

use std::fmt;

use crate::runtime::RuntimeError;

/// A whole image name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    registry: String,
    path: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl Reference {
    /// Completes and checks a name as people write it.
    ///
    /// # Errors
    /// What is wrong with it, as `InvalidImageName` says it.
    pub fn parse(text: &str) -> Result<Reference, RuntimeError> {
        let bad = |why: &str| RuntimeError::Image {
            message: format!("couldn't parse image name {text:?}: invalid reference format: {why}"),
        };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) if is_digest(digest) => (name, Some(digest.to_owned())),
            Some(_) => return Err(bad("expected sha256: and 64 hexadecimal digits behind the @")),
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag.to_owned())),
            _ => (name, None),
        };
        if tag.as_ref().is_some_and(|tag| !is_tag(tag)) {
            return Err(bad("the tag has characters that a tag cannot have"));
        }
        let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first.to_owned(), rest.to_owned()),
            Some(_) => ("docker.io".to_owned(), name.to_owned()),
            None => ("docker.io".to_owned(), format!("library/{name}")),
        };
        if !is_host_and_port(&registry) {
            return Err(bad("a registry is a host name or an address, and perhaps a port"));
        }
        let part = |part: &str| {
            !matches!(part, "" | "." | "..")
                && part.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-'))
        };
        if !path.split('/').all(part) {
            return Err(bad("a repository has lower-case letters, digits and . _ - /"));
        }
        let tag = if tag.is_none() && digest.is_none() { Some("latest".to_owned()) } else { tag };
        Ok(Reference { registry, path, tag, digest })
    }

    /// The registry's host and port.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Registry and path, without tag and digest.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.registry, self.path)
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub(crate) fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.path)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

/// It becomes a part of URLs and of file names.
fn is_host_and_port(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_port = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|n| n > 0)
    };
    let is_name = |host: &str| {
        host.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        })
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match address {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => is_name(host),
    };
    is_host && port.is_none_or(is_port)
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn is_tag(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    !text.is_empty()
        && text.len() <= 128
        && !text.starts_with(['.', '-'])
        && text.chars().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_as_everybody_expects() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, want) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.27", "docker.io/library/nginx:1.27".to_owned()),
            ("team/app", "docker.io/team/app:latest".to_owned()),
            ("localhost/app:1", "localhost/app:1".to_owned()),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest".to_owned()),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10".to_owned()),
            (&format!("quay.io/a/b:1@{digest}"), format!("quay.io/a/b@{digest}")),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), want, "{text}");
        }
    }

    #[test]
    fn a_name_leads_to_no_other_path_or_host() {
        for text in [
            "127.0.0.1:8080/../../x/y",
            "a.b/./c",
            "u:p.w@a.b/c",
            "a.b?x/c",
            "a.b#/c",
            "a.b\\c/d",
            "../x",
            "..:80/x",
            "a.b:0/c",
            "a.b:99999/c",
            "[::1/c",
            "[1.2.3.4]:5/c",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
        for text in ["[::1]:5000/x/y:z", "[fd00::1]/x", "a_b.c:5000/x", "LOCAL.host/x", "a/b..c"] {
            assert!(Reference::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_said_with_the_name() {
        for text in ["", "Nginx", "a b", "a@sha256:12", "a:", "a:b c", "x//y"] {
            let error = Reference::parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
