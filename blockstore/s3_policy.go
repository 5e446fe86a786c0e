package blockstore

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// MaxPolicyLength bounds a bucket policy, in bytes: S3's limit.
const MaxPolicyLength = 20 << 10

// A ReadPolicy is a bucket policy that lets some accounts read some objects of a
// store in S3, and do nothing else.
type ReadPolicy struct {
	// Accounts are the 12 digits of one of AWS, or an access key of another
	// server, each, or "all" among them for everybody.
	Accounts []string

	// Name tells its statements from others of the bucket; letters and digits.
	Name string

	// Keys are the keys of the objects; a * behind one stands for anything.
	Keys []string

	// Prefixes are what may be listed: exactly these prefixes, none that
	// continues them.
	Prefixes []string
}

// policyStatement is a statement of a bucket policy, as
// https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-policy-language-overview.html
// has it.
type policyStatement struct {
	Sid       string
	Effect    string
	Principal any
	Action    string
	Resource  []string
	Condition map[string]map[string][]string `json:",omitempty"`
}

// JSON returns the policy for the store at a URL, of at most MaxPolicyLength
// bytes (else ErrTooLarge). It is an error if that is no bucket.
func (p ReadPolicy) JSON(storeURL string) ([]byte, error) {
	u, err := parseURL(storeURL)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "s3" {
		return nil, fmt.Errorf("store %s is no bucket, and has no policy", storeURL)
	}
	const arn = "arn:aws:s3:::"
	var prefix string
	if u.Path != "" {
		prefix = u.Path + "/"
	}
	read := policyStatement{Sid: p.Name + "Read", Effect: "Allow", Principal: p.principal(), Action: "s3:GetObject"}
	for _, key := range p.Keys {
		read.Resource = append(read.Resource, arn+u.Host+"/"+prefix+key)
	}
	list := policyStatement{Sid: p.Name + "List", Effect: "Allow", Principal: p.principal(), Action: "s3:ListBucket", Resource: []string{arn + u.Host}}
	var prefixes []string
	for _, p := range p.Prefixes {
		prefixes = append(prefixes, prefix+p)
	}
	list.Condition = map[string]map[string][]string{"StringEquals": {"s3:prefix": prefixes}}
	policy := struct {
		Version   string
		Statement []policyStatement
	}{"2012-10-17", []policyStatement{read, list}}
	data, err := json.MarshalIndent(policy, "", " ")
	if err == nil && len(data) > MaxPolicyLength { // without what is only for people
		data, err = json.Marshal(policy)
	}
	if err == nil && len(data) > MaxPolicyLength {
		err = fmt.Errorf("%w: the policy has %d bytes, and a bucket's at most %d", ErrTooLarge, len(data), MaxPolicyLength)
	}
	return data, err
}

// principal names the accounts as bucket policies do.
func (p ReadPolicy) principal() any {
	if slices.Contains(p.Accounts, "all") {
		return "*"
	}
	var names []string
	for _, account := range p.Accounts {
		if len(account) == 12 && strings.Trim(account, "0123456789") == "" {
			account = "arn:aws:iam::" + account + ":root"
		}
		names = append(names, account)
	}
	return struct{ AWS []string }{names}
}
