package blockstore

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
)

// Open returns the store that a URL names:
//
//	file:///absolute/path
//	s3://bucket/prefix?region=…&endpoint=…&profile=…
//
// Of the second form only the bucket is required; what the query leaves open
// comes from the AWS environment and configuration files (see [NewS3]). Open
// does not ask whether the store exists. It makes single requests: wrap it in
// Retry.
func Open(ctx context.Context, rawURL string) (Store, error) {
	u, err := parseURL(rawURL)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "file" {
		return NewDir(u.Path), nil
	}
	return NewS3(ctx, s3Config(u))
}

// Create is Open for a store that is about to be initialised: it makes the
// directory of a file URL, durably and with its parents, unless it is there. It
// never makes a bucket.
func Create(ctx context.Context, rawURL string) (Store, error) {
	u, err := parseURL(rawURL)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "file" {
		if err := makeDir(u.Path); err != nil {
			return nil, fmt.Errorf("create store %s: %w", rawURL, err)
		}
	}
	return Open(ctx, rawURL)
}

// parseURL returns a URL that is well-formed for its scheme: a file URL has a
// clean absolute path, and an s3 URL a bucket, no slash at the end of its path,
// and only queries that mean something.
func parseURL(rawURL string) (*url.URL, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("store URL: %w", err) // names the URL itself
	}
	switch {
	case u.Scheme == "":
		return nil, fmt.Errorf("store URL %q: it must begin with s3:// or file://", rawURL)
	case u.Opaque != "":
		return nil, fmt.Errorf("store URL %q: %s: must be followed by //", rawURL, u.Scheme)
	case u.User != nil:
		return nil, fmt.Errorf("store URL %s: credentials do not belong in it", u.Redacted())
	case u.Fragment != "":
		return nil, fmt.Errorf("store URL %q: a fragment (#%s) means nothing here", rawURL, u.Fragment)
	}
	switch u.Scheme {
	case "file":
		err = checkFileURL(u)
	case "s3":
		err = checkS3URL(u)
	default:
		err = fmt.Errorf("unknown scheme %q, want s3 or file", u.Scheme)
	}
	if err != nil {
		return nil, fmt.Errorf("store URL %q: %w", rawURL, err)
	}
	return u, nil
}

func checkFileURL(u *url.URL) error {
	if u.Host != "" {
		return fmt.Errorf("the path must be absolute, with three slashes before it: file:///%s%s", u.Host, u.Path)
	}
	if u.RawQuery != "" {
		return errors.New("a file URL takes no query")
	}
	u.Path = path.Clean(u.Path)
	if u.Path == "/" || u.Path == "." {
		return errors.New("it names no directory")
	}
	return nil
}

func checkS3URL(u *url.URL) error {
	if u.Host == "" {
		return errors.New("it names no bucket")
	}
	if strings.Contains(u.Host, ":") {
		return fmt.Errorf("%q is not a bucket; a server's address goes into ?endpoint=", u.Host)
	}
	u.Path = strings.Trim(u.Path, "/")
	if u.Path != "" {
		if err := CheckKey(u.Path); err != nil {
			return fmt.Errorf("prefix: %w", err)
		}
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return err
	}
	for name, values := range query {
		switch {
		case name != "region" && name != "endpoint" && name != "profile":
			return fmt.Errorf("unknown setting %q, want region, endpoint or profile", name)
		case len(values) != 1 || values[0] == "":
			return fmt.Errorf("setting %q needs exactly one value", name)
		}
	}
	return nil
}

func s3Config(u *url.URL) S3Config {
	query := u.Query()
	return S3Config{
		Bucket:   u.Host,
		Prefix:   u.Path,
		Region:   query.Get("region"),
		Endpoint: query.Get("endpoint"),
		Profile:  query.Get("profile"),
	}
}
