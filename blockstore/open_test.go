package blockstore_test

import (
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
)

// isolateAWS makes the test independent of the AWS settings of its environment.
func isolateAWS(t *testing.T) {
	for _, name := range []string{"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN",
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CA_BUNDLE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
}

func TestOpenRefusesMalformedURLsAndSaysWhy(t *testing.T) {
	for url, want := range map[string]string{
		"":                                    "must begin with",
		"/var/lib/store":                      "must begin with",
		"bucket/prefix":                       "must begin with",
		"http://host/bucket":                  "unknown scheme",
		"mem://":                              "unknown scheme",
		"s3:bucket/prefix":                    "followed by //",
		"file:store":                          "followed by //",
		"s3://%zz":                            "invalid URL escape",
		"s3://":                               "names no bucket",
		"s3:///prefix":                        "names no bucket",
		"s3://bucket:9000/prefix":             "?endpoint=",
		"s3://key:secret@bucket":              "credentials do not belong",
		"s3://bucket#fragment":                "fragment",
		"s3://bucket/a b":                     "character",
		"s3://bucket/a//b":                    "empty part",
		"s3://bucket/../b":                    "dot",
		"s3://bucket?Region=x":                `unknown setting "Region"`,
		"s3://bucket?regoin=x":                `unknown setting "regoin"`,
		"s3://bucket?region=":                 "exactly one value",
		"s3://bucket?region=a&region=b":       "exactly one value",
		"s3://bucket?region=%zz":              "invalid URL escape",
		"s3://bucket?endpoint=localhost:9000": "want http://host:port",
		"s3://bucket?endpoint=http://":        "want http://host:port",
		"s3://bucket?endpoint=http://key:secret@host": "credentials do not belong",
		"file://relative/path":                        "three slashes",
		"file:///":                                    "names no directory",
		"file://":                                     "names no directory",
		"file:///a/..":                                "names no directory",
		"file:///path?region=x":                       "takes no query",
		"file:///path#x":                              "fragment",
	} {
		s, err := blockstore.Open(t.Context(), url)
		if err == nil {
			t.Errorf("%q opened as %s", url, s)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got error %q, want one that says %q", url, err, want)
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error shows a secret: %v", url, err)
		}
	}
}

func TestOpenedStoreNamesItself(t *testing.T) {
	isolateAWS(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	for url, want := range map[string]string{
		"file:///var/lib/store":            "",
		"file:///var//lib/../store/":       "file:///var/store",
		"file:///with%20space":             "",
		"s3://bucket?region=eu-central-1":  "",
		"s3://bucket/?region=eu-central-1": "s3://bucket?region=eu-central-1",
		"s3://bucket/some/prefix?endpoint=http%3A%2F%2Flocalhost%3A9000&region=here":      "",
		"s3://bucket/some/prefix/?region=here&endpoint=https://minio.example/s3-gateway/": "s3://bucket/some/prefix?endpoint=https%3A%2F%2Fminio.example%2Fs3-gateway%2F&region=here",
	} {
		if want == "" {
			want = url
		}
		for range 2 { // what a store calls itself opens it again
			s, err := blockstore.Open(t.Context(), url)
			if err != nil {
				t.Errorf("%q: %v", url, err)
				break
			}
			if s.String() != want {
				t.Errorf("%q opened as %q, want %q", url, s, want)
			}
			url = s.String()
		}
	}
}

func FuzzParseURL(f *testing.F) {
	for _, seed := range []string{"file:///path", "s3://bucket/prefix?region=r&endpoint=http://h:1&profile=p", "s3://b//", "file:///%2e%2e/", "s3://[::1]/x", "file://\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := blockstore.ParseURL(raw)
		if err != nil {
			return
		}
		switch u.Scheme {
		case "file":
			if len(u.Path) < 2 || u.Path[0] != '/' || strings.Contains(u.Path+"/", "/../") || strings.HasSuffix(u.Path, "/") {
				t.Errorf("%q gave the path %q", raw, u.Path)
			}
		case "s3":
			if u.Host == "" {
				t.Errorf("%q gave no bucket", raw)
			}
			if u.Path != "" && blockstore.CheckKey(u.Path) != nil {
				t.Errorf("%q gave the prefix %q", raw, u.Path)
			}
		default:
			t.Errorf("%q has the scheme %q", raw, u.Scheme)
		}
	})
}
