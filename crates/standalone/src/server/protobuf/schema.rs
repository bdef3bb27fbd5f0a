//! Which fields the known messages have: numbers from the `generated.proto` files of k8s.io/api.

/// What a field holds.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Text,
    Integer,
    Bool,
    /// A number or a text (`intstr.IntOrString`).
    IntOrString,
    /// `resource.Quantity`: a message around a text.
    Quantity,
    /// Base64 in JSON.
    Bytes,
    Message(&'static [Field]),
    /// Map values are texts.
    TextMap,
    BytesMap,
    QuantityMap,
    /// Of no meaning in a request (status, timestamps).
    Ignored,
}

pub(super) struct Field {
    pub(super) number: u64,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) repeated: bool,
    /// A pointer in Go's types: there, zero differs from not being set. Any other field is sent with its zero, which JSON
    /// leaves out.
    pub(super) pointer: bool,
}

pub(super) const fn one(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, repeated: false, pointer: false }
}

const fn pointer(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, repeated: false, pointer: true }
}

const fn many(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, repeated: true, pointer: false }
}

use Kind::{Bool, BytesMap, Ignored, IntOrString, Integer, Message, QuantityMap, Text, TextMap};

const OBJECT_META: &[Field] = &[
    one(1, "name", Text),
    one(2, "generateName", Text),
    one(3, "namespace", Text),
    one(4, "selfLink", Ignored),
    one(5, "uid", Text),
    one(6, "resourceVersion", Text),
    one(7, "generation", Ignored),
    one(8, "creationTimestamp", Ignored),
    one(11, "labels", TextMap),
    one(12, "annotations", TextMap),
    many(14, "finalizers", Text),
    many(17, "managedFields", Ignored),
];

const LOCAL_REFERENCE: &[Field] = &[one(1, "name", Text)];

const OBJECT_REFERENCE: &[Field] = &[
    one(1, "kind", Text),
    one(2, "namespace", Text),
    one(3, "name", Text),
    one(4, "uid", Text),
    one(5, "apiVersion", Text),
    one(6, "resourceVersion", Text),
    one(7, "fieldPath", Text),
];

const LABEL_SELECTOR: &[Field] = &[
    one(1, "matchLabels", TextMap),
    many(
        2,
        "matchExpressions",
        Message(&[one(1, "key", Text), one(2, "operator", Text), many(3, "values", Text)]),
    ),
];

const CONTAINER: &[Field] = &[
    one(1, "name", Text),
    one(2, "image", Text),
    many(3, "command", Text),
    many(4, "args", Text),
    one(5, "workingDir", Text),
    many(
        6,
        "ports",
        Message(&[
            one(1, "name", Text),
            one(2, "hostPort", Integer),
            one(3, "containerPort", Integer),
            one(4, "protocol", Text),
            one(5, "hostIP", Text),
        ]),
    ),
    many(7, "env", Message(&[one(1, "name", Text), one(2, "value", Text)])),
    one(8, "resources", Message(&[one(1, "limits", QuantityMap), one(2, "requests", QuantityMap)])),
    one(13, "terminationMessagePath", Text),
    one(14, "imagePullPolicy", Text),
    one(16, "stdin", Bool),
    one(17, "stdinOnce", Bool),
    one(18, "tty", Bool),
    one(20, "terminationMessagePolicy", Text),
];

const POD_SPEC: &[Field] = &[
    many(2, "containers", Message(CONTAINER)),
    one(3, "restartPolicy", Text),
    pointer(4, "terminationGracePeriodSeconds", Integer),
    pointer(5, "activeDeadlineSeconds", Integer),
    one(6, "dnsPolicy", Text),
    one(7, "nodeSelector", TextMap),
    one(8, "serviceAccountName", Text),
    one(9, "serviceAccount", Text),
    one(10, "nodeName", Text),
    one(11, "hostNetwork", Bool),
    one(12, "hostPID", Bool),
    one(13, "hostIPC", Bool),
    many(15, "imagePullSecrets", Message(LOCAL_REFERENCE)),
    one(16, "hostname", Text),
    one(17, "subdomain", Text),
    one(19, "schedulerName", Text),
    many(20, "initContainers", Message(CONTAINER)),
    pointer(21, "automountServiceAccountToken", Bool),
    one(24, "priorityClassName", Text),
    one(29, "runtimeClassName", Text),
];

const POD_TEMPLATE: &[Field] =
    &[one(1, "metadata", Message(OBJECT_META)), one(2, "spec", Message(POD_SPEC))];

const DEPLOYMENT_SPEC: &[Field] = &[
    pointer(1, "replicas", Integer),
    one(2, "selector", Message(LABEL_SELECTOR)),
    one(3, "template", Message(POD_TEMPLATE)),
    one(
        4,
        "strategy",
        Message(&[
            one(1, "type", Text),
            one(
                2,
                "rollingUpdate",
                Message(&[one(1, "maxUnavailable", IntOrString), one(2, "maxSurge", IntOrString)]),
            ),
        ]),
    ),
    one(5, "minReadySeconds", Integer),
    pointer(6, "revisionHistoryLimit", Integer),
    one(7, "paused", Bool),
    pointer(9, "progressDeadlineSeconds", Integer),
];

const SERVICE_SPEC: &[Field] = &[
    many(
        1,
        "ports",
        Message(&[
            one(1, "name", Text),
            one(2, "protocol", Text),
            one(3, "port", Integer),
            one(4, "targetPort", IntOrString),
            one(5, "nodePort", Integer),
            one(6, "appProtocol", Text),
        ]),
    ),
    one(2, "selector", TextMap),
    one(3, "clusterIP", Text),
    one(4, "type", Text),
    many(5, "externalIPs", Text),
    one(7, "sessionAffinity", Text),
    one(8, "loadBalancerIP", Text),
    many(9, "loadBalancerSourceRanges", Text),
    one(10, "externalName", Text),
    one(11, "externalTrafficPolicy", Text),
    one(12, "healthCheckNodePort", Integer),
    one(13, "publishNotReadyAddresses", Bool),
    one(17, "ipFamilyPolicy", Text),
    many(18, "clusterIPs", Text),
    many(19, "ipFamilies", Text),
    one(22, "internalTrafficPolicy", Text),
];

const TOKEN_REQUEST_SPEC: &[Field] = &[
    many(1, "audiences", Text),
    one(
        3,
        "boundObjectRef",
        Message(&[
            one(1, "kind", Text),
            one(2, "apiVersion", Text),
            one(3, "name", Text),
            one(4, "uid", Text),
        ]),
    ),
    pointer(4, "expirationSeconds", Integer),
];

const META: Field = one(1, "metadata", Message(OBJECT_META));
const STATUS: Field = one(3, "status", Ignored);

const SECRET: &[Field] = &[
    META,
    one(2, "data", BytesMap),
    one(3, "type", Text),
    one(4, "stringData", TextMap),
    pointer(5, "immutable", Bool),
];
const CONFIG_MAP: &[Field] =
    &[META, one(2, "data", TextMap), one(3, "binaryData", BytesMap), pointer(4, "immutable", Bool)];
const NAMESPACE: &[Field] =
    &[META, one(2, "spec", Message(&[many(1, "finalizers", Text)])), STATUS];
const SERVICE_ACCOUNT: &[Field] = &[
    META,
    many(2, "secrets", Message(OBJECT_REFERENCE)),
    many(3, "imagePullSecrets", Message(LOCAL_REFERENCE)),
    pointer(4, "automountServiceAccountToken", Bool),
];
const SERVICE: &[Field] = &[META, one(2, "spec", Message(SERVICE_SPEC)), STATUS];
const POD: &[Field] = &[META, one(2, "spec", Message(POD_SPEC)), STATUS];
const DEPLOYMENT: &[Field] = &[META, one(2, "spec", Message(DEPLOYMENT_SPEC)), STATUS];
const TOKEN_REQUEST: &[Field] = &[META, one(2, "spec", Message(TOKEN_REQUEST_SPEC)), STATUS];

const ACCESS_SPEC: &[Field] = &[
    one(
        1,
        "resourceAttributes",
        Message(&[
            one(1, "namespace", Text),
            one(2, "verb", Text),
            one(3, "group", Text),
            one(4, "version", Text),
            one(5, "resource", Text),
            one(6, "subresource", Text),
            one(7, "name", Text),
        ]),
    ),
    one(2, "nonResourceAttributes", Message(&[one(1, "path", Text), one(2, "verb", Text)])),
];
const ACCESS_REVIEW: &[Field] = &[META, one(2, "spec", Message(ACCESS_SPEC)), STATUS];
const RULES_REVIEW: &[Field] =
    &[META, one(2, "spec", Message(&[one(1, "namespace", Text)])), STATUS];
const SELF_REVIEW: &[Field] = &[META, one(2, "status", Ignored)];
const DELETE_OPTIONS: &[Field] = &[
    pointer(1, "gracePeriodSeconds", Integer),
    one(2, "preconditions", Message(&[one(1, "uid", Text), one(2, "resourceVersion", Text)])),
    pointer(3, "orphanDependents", Bool),
    one(4, "propagationPolicy", Text),
    many(5, "dryRun", Text),
];
const EVICTION: &[Field] = &[META, one(2, "deleteOptions", Message(DELETE_OPTIONS))];

/// The messages that are known, by API version and kind.
pub(super) fn message_of(api_version: &str, kind: &str) -> Option<&'static [Field]> {
    Some(match (api_version, kind) {
        ("v1", "Secret") => SECRET,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ServiceAccount") => SERVICE_ACCOUNT,
        ("v1", "Service") => SERVICE,
        ("v1", "Pod") => POD,
        ("apps/v1", "Deployment") => DEPLOYMENT,
        ("authentication.k8s.io/v1", "TokenRequest") => TOKEN_REQUEST,
        ("authentication.k8s.io/v1", "SelfSubjectReview") => SELF_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectAccessReview") => ACCESS_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectRulesReview") => RULES_REVIEW,
        ("policy/v1", "Eviction") => EVICTION,
        // It is of the version of what it deletes.
        (_, "DeleteOptions") => DELETE_OPTIONS,
        _ => return None,
    })
}
