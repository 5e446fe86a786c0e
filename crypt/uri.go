package crypt

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws/arn"
)

// MaxURI is the length in bytes of the longest key URI: what a lineage's record
// has room for.
const MaxURI = 2 << 10

// keyURI is a parsed key URI: path is set, or kmsKey and perhaps server.
type keyURI struct {
	path   string // of a key file: clean and absolute
	kmsKey string // an ARN, "alias/" and a name, or an id
	server kmsServer
}

// kmsServer is which KMS to ask, and as whom. What is empty comes from the AWS
// environment and configuration files.
type kmsServer struct{ region, endpoint, profile string }

// ValidateURI checks, without any I/O, that a URI is well-formed:
//
//	file:///absolute/path
//	awskms:///KEY[?region=…&endpoint=…&profile=…]
//
// where KEY is a key's ARN, an alias's ARN, "alias/" and a name, or a key's id.
// Its errors are ErrKeyURI.
func ValidateURI(uri string) error {
	_, err := parseURI(uri)
	return err
}

// parseURI does not repeat what is no key URI in its errors: somebody may have
// pasted the key itself.
func parseURI(raw string) (keyURI, error) {
	scheme, rest, _ := strings.Cut(raw, "://")
	switch strings.ToLower(scheme) {
	case "file", "awskms":
	default:
		return keyURI{}, fmt.Errorf("%w: it must begin with file:/// (and the absolute path of a key file) or awskms:/// (and a key of AWS KMS: its ARN, id or alias/name)", ErrKeyURI)
	}
	if len(raw) > MaxURI {
		return keyURI{}, fmt.Errorf("%w: it has %d bytes, and at most %d are allowed", ErrKeyURI, len(raw), MaxURI)
	}
	if !strings.HasPrefix(rest, "/") && !strings.Contains(rest, "@") {
		return keyURI{}, fmt.Errorf("%w: %q needs three slashes: %s:///%s", ErrKeyURI, raw, strings.ToLower(scheme), rest)
	}
	u, err := parseURL(raw)
	if err != nil {
		return keyURI{}, fmt.Errorf("%w: %w", ErrKeyURI, err)
	}
	if u.User != nil {
		return keyURI{}, fmt.Errorf("%w: %s: credentials do not belong in it", ErrKeyURI, u.Redacted())
	}
	var k keyURI
	switch {
	case u.Host != "":
		err = errors.New("nothing may stand between the second slash and the third")
	case u.Fragment != "":
		err = fmt.Errorf("a fragment (#%s) means nothing here", u.Fragment)
	case u.Scheme == "file":
		k, err = parseFile(u)
	default:
		k, err = parseKMS(u)
	}
	if err != nil {
		return keyURI{}, fmt.Errorf("%w: %s://%s: %w", ErrKeyURI, u.Scheme, u.EscapedPath(), err)
	}
	if s := k.String(); len(s) > MaxURI {
		return keyURI{}, fmt.Errorf("%w: written out, it has %d bytes, and at most %d are allowed", ErrKeyURI, len(s), MaxURI)
	}
	return k, nil
}

func parseFile(u *url.URL) (keyURI, error) {
	name := path.Clean(u.Path)
	switch {
	case u.RawQuery != "":
		return keyURI{}, errors.New("a file URI takes no query (a question mark in a name is written %3F)")
	case name == "/":
		return keyURI{}, errors.New("it names no file")
	case strings.Contains(name, "\x00"):
		return keyURI{}, errors.New("no file's name holds a zero byte")
	}
	return keyURI{path: name}, nil
}

var (
	// https://docs.aws.amazon.com/kms/latest/APIReference/API_CreateAlias.html;
	// an id is a UUID or "mrk-" and hex digits, but stand-ins have others.
	aliasName = regexp.MustCompile(`^alias/[A-Za-z0-9/_-]{1,250}$`)
	keyID     = regexp.MustCompile(`^[A-Za-z0-9_-]{1,256}$`)

	// A region becomes part of a host's name.
	regionName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
)

func parseKMS(u *url.URL) (keyURI, error) {
	key := strings.TrimPrefix(u.Path, "/")
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return keyURI{}, err
	}
	for name, values := range query {
		switch {
		case name != "region" && name != "endpoint" && name != "profile":
			return keyURI{}, fmt.Errorf("unknown setting %q, want region, endpoint or profile", name)
		case len(values) != 1 || values[0] == "":
			return keyURI{}, fmt.Errorf("setting %q needs exactly one value", name)
		}
	}
	server := kmsServer{region: query.Get("region"), endpoint: query.Get("endpoint"), profile: query.Get("profile")}
	if server.region != "" && !regionName.MatchString(server.region) {
		return keyURI{}, fmt.Errorf("%q is no AWS region", server.region)
	}
	if server.endpoint != "" {
		if err := checkEndpoint(server.endpoint); err != nil {
			return keyURI{}, err
		}
	}
	switch {
	case key == "":
		return keyURI{}, errors.New("it names no key")
	case isARN(key):
		region, err := arnRegion(key)
		if err != nil {
			return keyURI{}, err
		}
		if server.region != "" && server.region != region {
			return keyURI{}, fmt.Errorf("the key is in %s, and ?region= says %s", region, server.region)
		}
		server.region = region
	case strings.HasPrefix(key, "alias/"):
		if !aliasName.MatchString(key) {
			return keyURI{}, errors.New("an alias's name has letters, digits, slashes, underscores and dashes only")
		}
	case !keyID.MatchString(key):
		return keyURI{}, fmt.Errorf("%q is neither a key's ARN or id nor alias/ and a name", key)
	}
	return keyURI{kmsKey: key, server: server}, nil
}

// isARN reports whether a key is named by an ARN, which tells its region.
func isARN(key string) bool { return strings.HasPrefix(key, "arn:") }

// arnRegion returns the region of a key's or an alias's ARN.
func arnRegion(key string) (string, error) {
	a, err := arn.Parse(key)
	if err != nil {
		return "", fmt.Errorf("%q is not an ARN: want arn:aws:kms:REGION:ACCOUNT:key/ID", key)
	}
	id, isKey := strings.CutPrefix(a.Resource, "key/")
	switch {
	case a.Service != "kms":
		return "", fmt.Errorf("the ARN is of %s, not of kms", a.Service)
	case !regionName.MatchString(a.Region):
		return "", fmt.Errorf("%q is no AWS region", a.Region)
	case isKey && keyID.MatchString(id), !isKey && aliasName.MatchString(a.Resource):
		return a.Region, nil
	}
	return "", fmt.Errorf("the ARN names a %q, not key/ID or alias/NAME", a.Resource)
}

// parseURL is url.Parse, without the URL in its errors: it may hold a password.
func parseURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if parse := (*url.Error)(nil); errors.As(err, &parse) {
		return nil, parse.Err
	}
	return u, err
}

func checkEndpoint(endpoint string) error {
	u, err := parseURL(endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("endpoint: %w", err)
	case u.User != nil:
		return fmt.Errorf("endpoint %s: credentials do not belong in it", u.Redacted())
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "":
		return fmt.Errorf("endpoint %q: want https://host or http://host:port", endpoint)
	}
	return nil
}

// String returns the URI in the one way it is recorded: the region of an ARN is
// not said twice.
func (k keyURI) String() string {
	if k.path != "" {
		return (&url.URL{Scheme: "file", Path: k.path}).String()
	}
	query := url.Values{}
	for name, value := range map[string]string{"region": k.server.region, "endpoint": k.server.endpoint, "profile": k.server.profile} {
		if value != "" && (name != "region" || !isARN(k.kmsKey)) {
			query.Set(name, value)
		}
	}
	return (&url.URL{Scheme: "awskms", Path: "/" + k.kmsKey, RawQuery: query.Encode()}).String()
}
