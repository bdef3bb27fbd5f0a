//! The text of a kubeconfig.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::auth::pki::Leaf;

/// JSON is YAML, and needs no rules for quoting.
pub(super) fn render(url: &str, ca_pem: &str, user: &str, leaf: &Leaf) -> String {
    let encode = |text: &str| STANDARD.encode(text);
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "keelson",
        "clusters": [{"name": "keelson", "cluster": {
            "server": url, "certificate-authority-data": encode(ca_pem),
        }}],
        "users": [{"name": user, "user": {
            "client-certificate-data": encode(&leaf.certificate),
            "client-key-data": encode(&leaf.key),
        }}],
        "contexts": [{"name": "keelson", "context": {"cluster": "keelson", "user": user}}],
    });
    format!("{config:#}\n")
}
