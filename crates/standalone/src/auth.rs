//! Who asks, and what they may do.

pub(crate) mod authorise;
pub(crate) mod pki;
pub(crate) mod token;

/// Who sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) user: String,
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
}

impl Identity {
    /// Nobody in particular: no certificate, no token.
    pub(crate) fn anonymous() -> Self {
        Self {
            user: "system:anonymous".to_owned(),
            uid: String::new(),
            groups: vec!["system:unauthenticated".to_owned()],
        }
    }

    /// The server itself, and who holds the admin kubeconfig.
    pub(crate) fn authenticated(user: &str, mut groups: Vec<String>) -> Self {
        groups.push("system:authenticated".to_owned());
        Self { user: user.to_owned(), uid: String::new(), groups }
    }

    pub(crate) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.user == "system:anonymous"
    }
}
