//! Labels and taints of the node as flags write them: `a=b,c=d` and `key=value:NoSchedule`.

use std::collections::BTreeMap;

use super::BadValue;

/// A taint that the node is registered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTaint {
    pub key: String,
    pub value: Option<String>,
    pub effect: String,
}

const LABEL: &str = "a list of labels (such as disk=ssd,example.com/zone=a)";
const TAINT: &str = "a list of taints (such as dedicated=db:NoSchedule,spot:PreferNoSchedule)";

/// Reads `a=b,c=d`.
///
/// # Errors
/// When a key or a value is none that Kubernetes accepts.
pub fn parse_labels(field: &str, text: &str) -> Result<BTreeMap<String, String>, BadValue> {
    let mut labels = BTreeMap::new();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
        let (key, value) = pair.trim().split_once('=').unwrap_or((pair.trim(), ""));
        if !is_qualified_name(key) || !is_label_value(value) {
            return Err(BadValue::new(field, format!("{pair:?}"), LABEL));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(labels)
}

/// Reads `key=value:Effect,key:Effect`.
///
/// # Errors
/// When a key, a value or an effect is none that Kubernetes accepts.
pub fn parse_taints(field: &str, text: &str) -> Result<Vec<NodeTaint>, BadValue> {
    text.split(',')
        .filter(|taint| !taint.trim().is_empty())
        .map(|taint| {
            parse_taint(taint.trim())
                .ok_or_else(|| BadValue::new(field, format!("{taint:?}"), TAINT))
        })
        .collect()
}

fn parse_taint(text: &str) -> Option<NodeTaint> {
    let (name, effect) = text.rsplit_once(':')?;
    let (key, value) = match name.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (name, None),
    };
    taint(key, value, effect)
}

/// A taint, if its parts are ones that Kubernetes accepts.
pub fn taint(key: &str, value: Option<&str>, effect: &str) -> Option<NodeTaint> {
    let known_effect = matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute");
    let valid = known_effect && is_qualified_name(key) && value.is_none_or(is_label_value);
    valid.then(|| NodeTaint {
        key: key.to_owned(),
        value: value.filter(|v| !v.is_empty()).map(str::to_owned),
        effect: effect.to_owned(),
    })
}

/// `[prefix/]name`: the prefix a DNS name, the name at most 63 letters, digits, `-`, `_` and `.`.
pub fn is_qualified_name(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(is_dns_subdomain)
}

/// At most 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit; or empty.
pub fn is_label_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
        && edge(bytes.first())
        && edge(bytes.last())
}

/// A DNS name in lower case: what a Node may be called.
pub fn is_dns_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        bytes.iter().all(|b| plain(b) || *b == b'-')
            && bytes.first().is_some_and(plain)
            && bytes.last().is_some_and(plain)
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_taints_of_the_usual_flags() {
        let labels = parse_labels("--node-labels", "disk=ssd,example.com/zone=a,bare").unwrap();
        assert_eq!(labels["disk"], "ssd");
        assert_eq!(labels["bare"], "");
        let taints = parse_taints("--register-with-taints", "a=b:NoSchedule,c:NoExecute").unwrap();
        assert_eq!(taints[0].value.as_deref(), Some("b"));
        assert_eq!(taints[1].effect, "NoExecute");
    }

    #[test]
    fn errors_name_the_flag_and_the_part() {
        let error = parse_labels("--node-labels", "ok=1,-bad=2").unwrap_err();
        assert_eq!(
            error.to_string(),
            "--node-labels: \"-bad=2\" is not a list of labels (such as disk=ssd,example.com/zone=a)"
        );
        for taint in ["a", "a=b", "a=b:Never", ":NoSchedule", "a=-:NoSchedule"] {
            assert!(parse_taints("--register-with-taints", taint).is_err(), "{taint}");
        }
    }
}
