//! Tokens of service accounts: JWTs signed with ES256, bound to an account and perhaps to a pod.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
    UnparsedPublicKey,
};
use serde_json::{Value, json};

use super::Identity;
use crate::kinds;
use crate::registry::Registry;

/// Who tokens say that they are from, and for.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Signs and checks tokens.
pub(crate) struct Tokens {
    key: EcdsaKeyPair,
    random: SystemRandom,
}

/// What a token is bound to.
pub(crate) struct Claims<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) account: &'a str,
    pub(crate) account_uid: &'a str,
    /// Name and uid.
    pub(crate) pod: Option<(&'a str, &'a str)>,
    pub(crate) audiences: Vec<String>,
    pub(crate) lifetime_secs: i64,
}

impl Tokens {
    /// Takes the key in PKCS#8.
    pub(crate) fn new(pkcs8: &[u8]) -> Result<Self, ring::error::KeyRejected> {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random)?;
        Ok(Self { key, random })
    }

    /// A new token.
    pub(crate) fn issue(&self, claims: &Claims<'_>) -> Result<String, ring::error::Unspecified> {
        let now = jiff::Timestamp::now().as_second();
        let mut bound = json!({
            "namespace": claims.namespace,
            "serviceaccount": {"name": claims.account, "uid": claims.account_uid},
        });
        if let Some((name, uid)) = claims.pod {
            bound["pod"] = json!({"name": name, "uid": uid});
        }
        let body = json!({
            "aud": claims.audiences, "iss": ISSUER, "iat": now, "nbf": now,
            "exp": now + claims.lifetime_secs, "jti": uuid::Uuid::new_v4().to_string(),
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account),
            "kubernetes.io": bound,
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed =
            format!("{}.{}", encode(&json!({"alg": "ES256", "typ": "JWT"})), encode(&body));
        let signature = self.key.sign(&self.random, signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Who a token stands for, and its audiences. None when it is not ours, is over, or when what it
    /// is bound to is gone.
    pub(crate) fn check(
        &self,
        token: &str,
        registry: &Registry,
    ) -> Option<(Identity, Vec<String>)> {
        let body = self.body(token)?;
        let now = jiff::Timestamp::now().as_second();
        if body["iss"] != ISSUER || body["exp"].as_i64()? <= now || body["nbf"].as_i64()? > now + 60
        {
            return None;
        }
        let bound = &body["kubernetes.io"];
        let namespace = bound["namespace"].as_str()?;
        let account = &bound["serviceaccount"];
        let alive = |kind, what: &Value| -> Option<()> {
            let object = registry.get(kind, namespace, what["name"].as_str()?).ok()?;
            (object.value()["metadata"]["uid"] == what["uid"]).then_some(())
        };
        alive(&kinds::SERVICE_ACCOUNT, account)?;
        if bound.get("pod").is_some() {
            alive(&kinds::POD, &bound["pod"])?;
        }
        let groups = vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
        ];
        let mut identity = Identity::authenticated(body["sub"].as_str()?, groups);
        identity.uid = account["uid"].as_str()?.to_owned();
        let audiences = body["aud"].as_array()?;
        let audiences = audiences.iter().filter_map(|a| a.as_str().map(str::to_owned)).collect();
        Some((identity, audiences))
    }

    pub(crate) fn body(&self, token: &str) -> Option<Value> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (head, body) = signed.split_once('.')?;
        let head: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(head).ok()?).ok()?;
        if head["alg"] != "ES256" {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        let public = self.key.public_key().as_ref();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, public)
            .verify(signed.as_bytes(), &signature)
            .ok()?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()
    }
}
