//! Who owns an object: controller references, adoption and release.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

/// The owner that controls the object, if one does.
pub(crate) fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// Whether the object with this uid controls the object.
pub(crate) fn is_controlled_by(meta: &ObjectMeta, uid: &str) -> bool {
    controller_of(meta).is_some_and(|owner| owner.uid == uid)
}

/// The reference that makes `owner` the controller of an object.
pub(crate) fn controller_reference<T: k8s_openapi::Resource>(owner: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: T::API_VERSION.to_owned(),
        kind: T::KIND.to_owned(),
        name: owner.name.clone().unwrap_or_default(),
        uid: owner.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// What an owner makes of an object that it might control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is the owner's already.
    Keep,
    /// It has no controller and matches: take it.
    Adopt,
    /// It is the owner's, but no longer matches: let it go.
    Release,
    /// It is none of the owner's business.
    Ignore,
}

/// Decides about one object, as controller references are meant to be used: only orphans are taken, an owner that is
/// being deleted takes nothing, and what is being deleted itself is left alone.
pub(crate) fn claim(owner: &ObjectMeta, object: &ObjectMeta, matches: bool) -> Claim {
    let owner_deleting = owner.deletion_timestamp.is_some();
    let owner_uid = owner.uid.as_deref().unwrap_or_default();
    match controller_of(object) {
        Some(controller) if controller.uid != owner_uid => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if owner_deleting || object.deletion_timestamp.is_some() => Claim::Ignore,
        Some(_) => Claim::Release,
        None if !matches || owner_deleting || object.deletion_timestamp.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    #[test]
    fn only_orphans_are_taken_and_strangers_left_alone() {
        let now = Some(Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH));
        let owner = ObjectMeta { uid: Some("o".into()), ..Default::default() };
        let dying_owner = ObjectMeta { deletion_timestamp: now.clone(), ..owner.clone() };
        let object = |uid: Option<&str>| ObjectMeta {
            owner_references: uid.map(|uid| {
                vec![OwnerReference {
                    uid: uid.into(),
                    controller: Some(true),
                    ..OwnerReference::default()
                }]
            }),
            ..Default::default()
        };
        let dying = ObjectMeta { deletion_timestamp: now, ..object(None) };
        let table = [
            (&owner, object(Some("o")), true, Claim::Keep),
            (&owner, object(Some("o")), false, Claim::Release),
            (&owner, object(Some("x")), true, Claim::Ignore),
            (&owner, object(None), true, Claim::Adopt),
            (&owner, object(None), false, Claim::Ignore),
            (&owner, dying, true, Claim::Ignore),
            (&dying_owner, object(None), true, Claim::Ignore),
            (&dying_owner, object(Some("o")), true, Claim::Keep),
            (&dying_owner, object(Some("o")), false, Claim::Ignore),
        ];
        for (number, (owner, object, matches, want)) in table.into_iter().enumerate() {
            assert_eq!(claim(owner, &object, matches), want, "row {number}");
        }
    }
}
