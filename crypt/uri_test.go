package crypt

import (
	"errors"
	"strings"
	"testing"
)

const testARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

func TestKeyURIIsWrittenInOneWay(t *testing.T) {
	for uri, want := range map[string]string{
		"file:///etc/key":                            "file:///etc/key",
		"FILE:///etc//x/../key/":                     "file:///etc/key",
		"file:///with%20space/%3F%23%25":             "file:///with%20space/%3F%23%25",
		"file:///a?":                                 "file:///a",
		"awskms:///" + testARN:                       "awskms:///" + testARN,
		"awskms:///" + testARN + "?region=eu-west-1": "awskms:///" + testARN,
		"awskms:///arn:aws-cn:kms:cn-north-1:111122223333:alias/a/b": "awskms:///arn:aws-cn:kms:cn-north-1:111122223333:alias/a/b",
		"awskms:///alias/disks?region=eu-west-1":                     "awskms:///alias/disks?region=eu-west-1",
		"awskms:///mrk-1234abcd12ab34cd56ef1234567890ab":             "awskms:///mrk-1234abcd12ab34cd56ef1234567890ab",
		"awskms:///alias/d?profile=p&endpoint=http%3A%2F%2Fh%3A1":    "awskms:///alias/d?endpoint=http%3A%2F%2Fh%3A1&profile=p",
	} {
		u, err := parseURI(uri)
		if err != nil {
			t.Errorf("%s: %v", uri, err)
			continue
		}
		if got := u.String(); got != want {
			t.Errorf("%s becomes %s, want %s", uri, got, want)
		}
		again, err := parseURI(want)
		if err != nil || again != u {
			t.Errorf("%s is %+v (%v), and %s %+v", uri, u, err, want, again)
		}
	}
}

func TestMalformedKeyURIIsRefusedWithWhatToDo(t *testing.T) {
	for uri, hint := range map[string]string{
		"":                              "file:///",
		"/etc/key":                      "file:///",
		"file:/etc/key":                 "file:///",
		"https://host/key":              "awskms:///",
		"arn:aws:kms:eu-west-1:1:key/a": "awskms:///",
		"file://etc/key":                "file:///etc/key",
		"file://":                       "three slashes",
		"file:///":                      "names no file",
		"file:///..":                    "names no file",
		"file:///a?mode=0600":           "%3F",
		"file:///a#b":                   "#b",
		"file:///a%00b":                 "zero byte",
		"file:///a%zz":                  "%zz",
		"file://user@host/a":            "credentials",
		"awskms:///":                    "names no key",
		"awskms://" + testARN:           "awskms:///" + testARN,
		"awskms://alias/disks":          "awskms:///alias/disks",
		"awskms:///alias/":              "letters",
		"awskms:///alias/a b":           "letters",
		"awskms:///a/b":                 "alias/",
		"awskms:///arn:aws:kms":         "not an ARN",
		"awskms:///arn:aws:s3:::bucket": "of s3",
		"awskms:///arn:aws:kms::111122223333:key/a":          "region",
		"awskms:///arn:aws:kms:evil.com:111122223333:key/a":  "region",
		"awskms:///arn:aws:kms:eu-west-1:111122223333:grant": "key/ID",
		"awskms:///" + testARN + "?region=us-east-1":         "eu-west-1",
		"awskms:///alias/a?region=evil.com/":                 "region",
		"awskms:///alias/a?region=":                          "one value",
		"awskms:///alias/a?region=a&region=b":                "one value",
		"awskms:///alias/a?token=b":                          "token",
		"awskms:///alias/a?endpoint=localhost:4566":          "http://",
		"awskms:///alias/a?endpoint=http://u:hunter2@h":      "credentials",
		"awskms:///alias/a?%zz":                              "%zz",
		"file:///" + strings.Repeat("a", MaxURI):             "at most 2048",
		"file:///" + strings.Repeat("é", MaxURI/3):           "at most 2048", // three times as long once escaped
	} {
		err := ValidateURI(uri)
		if !errors.Is(err, ErrKeyURI) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%.60q: %v, want ErrKeyURI with %q", uri, err, hint)
		}
	}
}

// Somebody will paste the key, or a password.
func TestErrorsDoNotRepeatWhatMayBeASecret(t *testing.T) {
	const secret = "hunter2"
	for _, uri := range []string{
		secret, "key: " + secret, "lazyvol-key://" + secret, "file://user:" + secret + "@host/a", "file://user:" + secret + "@host/%zz",
		"awskms://user:" + secret + "@/a", "awskms:///alias/a?endpoint=http://u:" + secret + "@h",
		"awskms:///alias/a?endpoint=http://u:" + secret + "@h:z",
	} {
		if err := ValidateURI(uri); !errors.Is(err, ErrKeyURI) || strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", uri, err)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, seed := range []string{"file:///etc/key", "awskms:///" + testARN, "awskms:///alias/a?region=b&profile=c&endpoint=http://d"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := parseURI(raw)
		if err != nil {
			if !errors.Is(err, ErrKeyURI) {
				t.Fatal(err)
			}
			return
		}
		again, err := parseURI(u.String())
		if err != nil || again != u {
			t.Fatalf("%q is %+v and written %q, which is %+v (%v)", raw, u, u, again, err)
		}
		if (u.path == "") == (u.kmsKey == "") {
			t.Fatalf("%q names both or neither", raw)
		}
	})
}
