//! What a URL's path means.

/// A parsed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Resource(ResourcePath),
    Other(String),
}

/// `/api/v1/namespaces/{namespace}/{resource}/{name}/{subresource}/{rest}` and its shorter forms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResourcePath {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: String,
    pub(crate) resource: String,
    pub(crate) name: String,
    pub(crate) subresource: String,
    pub(crate) rest: String,
}

/// Subresources of a namespace: anything else behind its name is a resource within it.
const OF_NAMESPACE: &[&str] = &["status", "finalize"];

pub(crate) fn parse(path: &str) -> Route {
    let other = || Route::Other(path.to_owned());
    let decoded: Vec<String> =
        path.split('/').filter(|s| !s.is_empty()).map(percent_decode).collect();
    let segments: Vec<&str> = decoded.iter().map(String::as_str).collect();
    let (group, version, rest) = match segments.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
        _ => return other(),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, resource, ..]
            if group.is_empty() && OF_NAMESPACE.contains(resource) && rest.len() == 3 =>
        {
            (*namespace, rest)
        }
        ["namespaces", namespace, inner @ ..] if !inner.is_empty() => (*namespace, inner),
        ["namespaces", name] if group.is_empty() => (*name, rest),
        _ => ("", rest),
    };
    let at = |i: usize| rest.get(i).copied().unwrap_or_default().to_owned();
    Route::Resource(ResourcePath {
        group: group.to_owned(),
        version: version.to_owned(),
        namespace: namespace.to_owned(),
        resource: at(0),
        name: at(1),
        subresource: at(2),
        rest: rest.get(3..).map(|r| r.join("/")).unwrap_or_default(),
    })
}

pub(crate) fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut left = text.bytes();
    while let Some(byte) = left.next() {
        let hex = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let mut ahead = left.clone();
        match (byte, ahead.next().and_then(hex), ahead.next().and_then(hex)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(high << 4 | low);
                left = ahead;
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The query parameters of a URL.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let decode = |text: &str| percent_decode(&text.replace('+', " "));
        let pairs = query.unwrap_or_default().split('&').filter(|p| !p.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(key, value)| (decode(key), decode(value)))
                .collect(),
        )
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.get(key).unwrap_or_default()
    }

    pub(crate) fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), Some("true" | "1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, want: [&str; 7]) {
        let Route::Resource(r) = parse(path) else { panic!("{path} is a resource") };
        let have = [r.group, r.version, r.namespace, r.resource, r.name, r.subresource, r.rest];
        assert_eq!(have, want.map(str::to_owned), "{path}");
    }

    #[test]
    fn paths() {
        check("/api/v1/pods", ["", "v1", "", "pods", "", "", ""]);
        check("/api/v1/namespaces", ["", "v1", "", "namespaces", "", "", ""]);
        check("/api/v1/namespaces/a", ["", "v1", "a", "namespaces", "a", "", ""]);
        check("/api/v1/namespaces/a/status", ["", "v1", "a", "namespaces", "a", "status", ""]);
        check("/api/v1/namespaces/a/pods/b/log", ["", "v1", "a", "pods", "b", "log", ""]);
        check("/api/v1/nodes/n/proxy/a/b", ["", "v1", "", "nodes", "n", "proxy", "a/b"]);
        check(
            "/apis/apps/v1/namespaces/a/deployments/d%2Fe/scale",
            ["apps", "v1", "a", "deployments", "d/e", "scale", ""],
        );
        for other in ["/api", "/api/v1", "/apis/apps/v1", "/healthz", "/"] {
            assert_eq!(parse(other), Route::Other(other.to_owned()));
        }
    }

    #[test]
    fn queries() {
        let query = Query::parse(Some("labelSelector=app%3Dweb%2Cx+y&watch=1&flag"));
        assert_eq!(query.text("labelSelector"), "app=web,x y");
        assert!(query.is_true("watch"));
        assert_eq!(query.get("flag"), Some(""));
    }
}
